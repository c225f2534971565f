"""Trained on tasks of N classes and tested on tasks of K (Munkhdalai & Yu 2017)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from mann_ext.experiments.metanet_results import Shares, figures, measured, tables
from mann_ext.experiments.reproduction import Run
from mann_ext.experiments.support_query_task import SupportQuery, for_ways

__all__ = ["figures", "measure", "tables"]

TEST_WAYS = (5, 10, 15, 20, 100)
MOST_QUERIES = 200
"""A task of more queries gets fewer of each class: a MetaNet keeps fast weights for every one."""


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy on held-out tasks of each number of classes: so many of the fewest, and of more
    classes as many as have as many queries in all."""

    def test(task: SupportQuery, model: nn.Module) -> Shares:
        found = {}
        for ways in TEST_WAYS:
            queries = min(config.episodes.queries, max(1, MOST_QUERIES // ways))
            share = min(1.0, TEST_WAYS[0] * config.episodes.queries / (ways * queries))
            tasks = task.held_out_tasks(math.ceil(share * episodes), ways, queries)
            found[str(ways)] = task.accuracies(for_ways(model, ways), tasks)
        return found

    return measured(config, trained, episodes, test)
