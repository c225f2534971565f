"""What the training loop asks of an experiment's task, such as `few_shot.FewShot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mann_ext.experiments.config import ExperimentConfig
from mann_ext.reporting import Table


class Sampler(Protocol):
    """Minibatches of episodes, endlessly, from random numbers of its own."""

    def sample(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """The episodes and the computations of one configuration.

    Its metric is a mean in each of K columns, such as the accuracy by instance.
    """

    columns: int
    """K."""
    data_name: str
    """What the episodes are made from."""
    held_out: str
    """What the model is evaluated on, such as "held-out classes"."""
    unused_parameters: bool
    """Whether some parameters get no gradient, for which several processes have to look."""

    @property
    def config(self) -> ExperimentConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def training_episodes(self) -> Sampler: ...

    def model(self) -> nn.Module:
        """A new model, its parameters drawn from torch's random numbers."""

    def loss(self, model: nn.Module, episodes: Any) -> tuple[Tensor, Tensor]:
        """The loss of a minibatch, and the metric's sum and count in each column, (2, K)."""

    def metrics(self, means: Sequence[float]) -> dict[str, Any]:
        """The metric's means, (K,), under names, ready for JSON; NaN where nothing was counted."""

    def summary(self, metrics: dict[str, Any]) -> str:
        """What to watch of `metrics` in one line."""

    def evaluate(self, model: nn.Module, episodes: int) -> tuple[int, dict[str, Any]]:
        """Metrics on at least ``episodes`` held-out episodes, the same ones at every call, with
        confidence intervals; and how many episodes it were."""

    def details(self, model: nn.Module) -> dict[str, Any]:
        """What else the results hold, ready for JSON: published numbers, an example to draw."""

    def table(self, results: dict[str, Any]) -> Table:
        """The results as a table, from what `evaluate` and `details` returned."""

    def draw(self, run_dir: Path) -> None:
        """Draw the figure of a finished run in its folder."""
