"""A base learner that was never trained, with fast weights alone (Munkhdalai & Yu 2017)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mann_ext.experiments.metanet_results import Shares, figures, measured, tables
from mann_ext.experiments.reproduction import Run
from mann_ext.experiments.support_query_task import SupportQuery
from mann_ext.models import MetaNet

__all__ = ["figures", "measure", "tables"]

FILTERS = (32, 128)
DRAWS = 10
"""Of the new slow weights."""


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy with the base learner that was trained, and with new ones."""

    def test(task: SupportQuery, model: nn.Module) -> Shares:
        assert isinstance(model, MetaNet)
        torch.manual_seed(config.run.seed)
        found = {"as trained": task.accuracies(model, task.held_out_tasks(episodes))}
        for filters in FILTERS:
            each = math.ceil(episodes / DRAWS)
            tasks = task.held_out_tasks(DRAWS * each)
            found[f"{filters} filters"] = torch.stack(
                [
                    task.accuracies(
                        model.with_base(filters), (next(tasks) for _ in range(each))
                    ).mean()
                    for _ in range(DRAWS)
                ]
            )
        return found

    return measured(config, trained, episodes, test)
