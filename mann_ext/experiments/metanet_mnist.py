"""From Omniglot to the digits of MNIST (Munkhdalai & Yu 2017)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mann_ext import data
from mann_ext.experiments.metanet_results import Shares, figures, measured, tables
from mann_ext.experiments.reproduction import Run
from mann_ext.experiments.support_query import TasksConfig
from mann_ext.experiments.support_query_task import ClassImages, SupportQuery, for_ways, small

__all__ = ["digits", "figures", "measure", "tables"]

DIGITS = 10


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy on tasks of the ten digits of the test set."""
    images = digits(config.episodes, train=False)

    def test(task: SupportQuery, model: nn.Module) -> Shares:
        tasks = task.tasks_of(images, episodes, DIGITS)
        return {str(DIGITS): task.accuracies(for_ways(model, DIGITS), tasks)}

    return measured(config, trained, episodes, test)


def digits(tasks: TasksConfig, train: bool) -> ClassImages:
    """MNIST; or ten synthetic characters, where the others are synthetic too."""
    if tasks.source == "synthetic":
        glyphs = data.synthetic_characters(DIGITS, drawings=40, seed=1)
        part = glyphs.images[:, :20] if train else glyphs.images[:, 20:]
        return small(replace(glyphs, images=part))
    return data.MNIST(tasks.data_root, train=train)
