"""What the regression and the quadratic functions have in common as tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mann_ext import figures
from mann_ext.data.functions import Functions, FunctionSampler
from mann_ext.experiments import function_results
from mann_ext.experiments.config import ExperimentConfig
from mann_ext.experiments.few_shot import TEST_SEED, as_config_error, build_model
from mann_ext.reporting import Table

WATCHED = (0, 1, 2, 5, 10, 20, 50)
"""Points seen before a prediction, for one line of metrics."""


class FunctionTask:
    """Functions are shown point by point: the input at t is (x_t, y_{t-1}), the target y_t.

    A subclass says what the functions are, what the error of an output is, and what it is compared
    with. Its metric is the mean error by the number of points seen before.

    Args:
        config: what to train.
        device: where the functions are made.
        rank: number of this process; each draws training functions of its own.

    Raises:
        ConfigError: an argument is out of range.
    """

    metric: str
    """Name of the error."""
    outputs: int
    """Numbers that the model says about a value."""
    held_out = "never-seen functions"
    unused_parameters = False
    data_name: str

    def __init__(self, config: ExperimentConfig, device: torch.device, rank: int = 0) -> None:
        self.config = config
        self.device = device
        self.dtype = torch.float64 if config.run.dtype == "float64" else torch.float32
        self.columns: int = config.episodes.length
        seed = config.run.seed
        with as_config_error():
            self.training_episodes = self.sampler(seed + rank)
            self._test_episodes = self.sampler(seed + TEST_SEED)
        self._test_start = self._test_episodes.state_dict()

    def sampler(self, seed: int) -> FunctionSampler:
        """Functions to learn."""
        raise NotImplementedError

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """outputs (T, B, O), targets (T, B) -> (T, B)."""
        raise NotImplementedError

    def baselines(self, functions: Functions) -> dict[str, Tensor]:
        """The errors (T, B) of other methods on the same points in the same order, by name; the
        best method comes first."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        """A new model, its parameters drawn from torch's random numbers.

        Raises:
            ConfigError: an argument of the model is out of range.
        """
        with as_config_error():
            model = build_model(self.config.model, self._test_episodes.dimensions + 1, self.outputs)
        return model.to(self.device, self.dtype)

    def output(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """inputs (T, B, D + 1) -> outputs (T, B, O), from an empty memory; float32 or wider."""
        autocast = self.config.run.autocast != "none"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            outputs: Tensor = model(inputs.to(self.dtype))[0]
        return outputs.float() if autocast else outputs

    def loss(self, model: nn.Module, episodes: Functions) -> tuple[Tensor, Tensor]:
        """The mean error of a minibatch, and its sum and count by number of points seen, (2, T)."""
        errors = self.errors(self.output(model, episodes.inputs), episodes.targets.to(self.dtype))
        sums = errors.detach().sum(1)
        return errors.mean(), torch.stack([sums, torch.full_like(sums, errors.shape[1])])

    def metrics(self, means: Sequence[float]) -> dict[str, Any]:
        """The mean error by the number of points seen before."""
        return {self.metric: by_points_seen(means)}

    def summary(self, metrics: dict[str, Any]) -> str:
        """The errors to watch."""
        means = metrics[self.metric]
        shown = [(n, means[str(n)]) for n in WATCHED if str(n) in means]
        return f"{self.metric} " + "  ".join(f"{n}: {value:.3g}" for n, value in shown)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, episodes: int) -> tuple[int, dict[str, Any]]:
        """How many functions; mean errors by the number of points seen, their 95 % intervals, and
        the same of the baselines, with our difference from them on the same points."""
        model.eval()
        ours, others = [], []
        for functions in self.held_out_functions(episodes):
            outputs, targets = self.output(model, functions.inputs), functions.targets
            ours.append(self.errors(outputs.double(), targets.double()))
            others.append(self.baselines(functions))
        model.train()
        errors = torch.cat(ours, 1)
        found = {
            **self.metrics(errors.mean(1).tolist()),
            "half_width_95": by_points_seen(half_widths(errors)),
            "mean": mean_over_points(errors),
            "baselines": {},
        }
        for name in others[0]:
            theirs = torch.cat([other[name] for other in others], 1)
            found["baselines"][name] = {
                **self.metrics(theirs.mean(1).tolist()),
                "half_width_95": by_points_seen(half_widths(theirs)),
                "mean": mean_over_points(theirs),
                "difference": by_points_seen((errors - theirs).mean(1).tolist()),
                "difference_half_width_95": by_points_seen(half_widths(errors - theirs)),
                "mean_difference": mean_over_points(errors - theirs),
            }
        return errors.shape[1], found

    def held_out_functions(self, episodes: int) -> Iterator[Functions]:
        """Minibatches of at least ``episodes`` functions, the same ones at every call."""
        self._test_episodes.load_state_dict(self._test_start)
        for _ in range(math.ceil(episodes / self.config.episodes.batch_size)):
            yield self._test_episodes.sample()

    def details(self, model: nn.Module) -> dict[str, Any]:
        """The metric's name."""
        return {"metric": self.metric}

    def table(self, results: dict[str, Any]) -> Table:
        """The errors by the number of points seen, beside the baselines'."""
        return function_results.table({"this run": results})

    def draw(self, run_dir: Path) -> None:
        """Draw the errors, in ``nll.png`` or ``mse.png``, and an example where there is one."""
        results = json.loads((run_dir / "results.json").read_text())
        if figures.available():
            figures.save(function_results.run_figure(results), run_dir / f"{self.metric}.png")


def by_points_seen(values: Sequence[float]) -> dict[str, float]:
    """Numbers by how many points were seen before, without those that are missing."""
    return {str(index): value for index, value in enumerate(values) if not math.isnan(value)}


def half_widths(errors: Tensor) -> list[float]:
    """Halves of the 95 % confidence intervals of the mean of errors (T, functions), by point; NaN
    for a single function."""
    return (1.959964 * errors.std(1) / math.sqrt(errors.shape[1])).tolist()


def mean_over_points(errors: Tensor) -> dict[str, float | None]:
    """The mean of errors (T, functions), with its 95 % interval over the functions."""
    of_function = errors.mean(0, keepdim=True)
    (width,) = half_widths(of_function)
    return {
        "value": of_function.mean().item(),
        "half_width_95": None if math.isnan(width) else width,
    }
