"""Learning functions from their points: regression with a MANN (Santoro et al. 2016, section 4.3)
and quadratic functions by an LSTM (Hochreiter, Younger & Conwell 2001).

What can be configured, and the presets. `regression` and `quadratics` have the tasks themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from mann_ext.experiments.config import ConfigError, ExperimentConfig, OptimiserConfig, RunConfig
from mann_ext.experiments.santoro import DEMO, ModelConfig

if TYPE_CHECKING:
    import torch

    from mann_ext.experiments.quadratics import Quadratics
    from mann_ext.experiments.regression import Regression


@dataclass(frozen=True)
class GaussianProcessConfig:
    """Functions of a Gaussian process, at points of the box [-1, 1]^D.

    The paper does not state its hyper-parameters. With these the exact Gaussian process gets most
    of the way from knowing nothing to the noise within an episode, and not all in the first points.
    """

    dimensions: int = 1
    """D, numbers in x."""
    lengthscale: float = 0.4
    """Of the kernel sd^2 exp(-|x - x'|^2 / (2 lengthscale^2))."""
    standard_deviation: float = 1.0
    """sd of the functions."""
    noise: float = 0.1
    """Standard deviation of the noise of each observation."""
    length: int = 50
    """Points of each function."""
    batch_size: int = 16
    """Functions a minibatch; of each process, where there are several."""

    def __post_init__(self) -> None:
        _at_least_one(self, "dimensions", "length", "batch_size")


@dataclass(frozen=True)
class QuadraticsEpisodesConfig:
    """Quadratic functions of two variables, at points of the square [-1, 1]^2."""

    length: int = 50
    """Points of each function."""
    batch_size: int = 16
    """Functions a minibatch; of each process, where there are several."""

    def __post_init__(self) -> None:
        _at_least_one(self, "length", "batch_size")


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, got {getattr(config, name)}")


@dataclass(frozen=True)
class RegressionConfig(ExperimentConfig):
    """A run of the paper's regression task."""

    name: ClassVar[str] = "regression"
    model: ModelConfig = field(default_factory=ModelConfig)
    episodes: GaussianProcessConfig = field(default_factory=GaussianProcessConfig)

    def task(self, device: torch.device, rank: int = 0) -> Regression:
        from mann_ext.experiments.regression import Regression

        return Regression(self, device, rank)


@dataclass(frozen=True)
class QuadraticsConfig(ExperimentConfig):
    """A run of the quadratic functions."""

    name: ClassVar[str] = "quadratics"
    model: ModelConfig = field(default_factory=lambda: ModelConfig(kind="lstm", hidden_size=100))
    episodes: QuadraticsEpisodesConfig = field(default_factory=QuadraticsEpisodesConfig)

    def task(self, device: torch.device, rank: int = 0) -> Quadratics:
        from mann_ext.experiments.quadratics import Quadratics

        return Quadratics(self, device, rank)


def _regression(dimensions: int, lengthscale: float, length: int) -> RegressionConfig:
    return RegressionConfig(
        # Each point is written to four slots, one a head: as many slots as an episode fills, or
        # the points seen first are erased and the error rises again.
        model=replace(DEMO.model, num_slots=4 * length),
        episodes=GaussianProcessConfig(dimensions, lengthscale, length=length),
        # Twice the demo's rate: after 2,600 minibatches the loss is -0.09 instead of -0.02.
        optimiser=replace(DEMO.optimiser, learning_rate=2e-3, clip_norm=1.0),
        run=RunConfig(minibatches=100_000),
    )


# Lengthscales grow with the typical distance of two points, and so does the number of points.
REGRESSION_1D = _regression(1, 0.4, length=50)
REGRESSION_2D = _regression(2, 0.6, length=75)
REGRESSION_3D = _regression(3, 0.8, length=100)
QUADRATICS = QuadraticsConfig(
    optimiser=OptimiserConfig(learning_rate=3e-3, clip_norm=1.0),
    run=RunConfig(minibatches=50_000),
)

PRESETS: dict[str, tuple[ExperimentConfig, str]] = {
    "santoro-regression-1d": (REGRESSION_1D, "figures 5 and 6, MANN: functions of 1 variable"),
    "santoro-regression-2d": (REGRESSION_2D, "figure 6, MANN: functions of 2 variables"),
    "santoro-regression-3d": (REGRESSION_3D, "figure 6, MANN: functions of 3 variables"),
    "hochreiter-quadratics": (QUADRATICS, "LSTM that learns never-seen quadratic functions"),
}
