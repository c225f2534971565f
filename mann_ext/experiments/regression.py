"""Regression of functions from a Gaussian process (Santoro et al. 2016, section 4.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mann_ext.data.functions import (
    Functions,
    FunctionSampler,
    GaussianProcess,
    GaussianProcessSampler,
)
from mann_ext.experiments.function_task import FunctionTask
from mann_ext.experiments.functions import RegressionConfig

EXACT = "exact Gaussian process"
EXAMPLE = 20
"""Points that an example shows before its predictions."""
CURVE = 201
"""Points at which an example's predictions are drawn."""


class Regression(FunctionTask):
    """The model's two outputs are the mean and the log-variance of the next value.

    It is compared with the Gaussian process that the functions are from, its hyper-parameters
    known, conditioned on the same points in the same order: no method has a smaller expected error.
    """

    config: RegressionConfig
    metric = "nll"
    outputs = 2

    def __init__(self, config: RegressionConfig, device: torch.device, rank: int = 0) -> None:
        super().__init__(config, device, rank)
        episodes = config.episodes
        variables = f"{episodes.dimensions} variable{'s' * (episodes.dimensions > 1)}"
        self.data_name = (
            f"functions of {variables} from a Gaussian process, lengthscale "
            f"{episodes.lengthscale:g}, noise {episodes.noise:g}"
        )

    def process(self) -> GaussianProcess:
        """The process that the functions are from."""
        episodes = self.config.episodes
        return GaussianProcess(episodes.lengthscale, episodes.standard_deviation, episodes.noise)

    def sampler(self, seed: int) -> FunctionSampler:
        """Functions of the Gaussian process."""
        episodes = self.config.episodes
        return GaussianProcessSampler(
            self.process(),
            dimensions=episodes.dimensions,
            length=episodes.length,
            batch_size=episodes.batch_size,
            seed=seed,
            device=self.device,
        )

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood of a Gaussian,
        (log 2 pi + log-variance + (y - mean)^2 / variance) / 2."""
        mean, log_variance = outputs.unbind(-1)
        squares = (targets - mean).square() * (-log_variance).exp()
        return 0.5 * (math.log(2 * math.pi) + log_variance + squares)

    def baselines(self, functions: Functions) -> dict[str, Tensor]:
        """The exact Gaussian process."""
        x, y = functions.x.transpose(0, 1), functions.targets.t()
        return {EXACT: self.process().negative_log_likelihoods(x, y).t()}

    def details(self, model: nn.Module) -> dict[str, Any]:
        """With one variable, also an example: predictions of the first held-out function after 20
        of its points, by the model and by the exact Gaussian process."""
        details = super().details(model)
        if self.config.episodes.dimensions == 1:
            details["example"] = self.example(model)
        return details

    @torch.inference_mode()
    def example(self, model: nn.Module) -> dict[str, Any]:
        """Points x, y of a function of one variable, and mean and standard deviation at others."""
        functions = next(self.held_out_functions(1))
        shown = min(EXAMPLE, len(functions.targets) - 1)
        x, y = functions.x[:shown, 0], functions.targets[:shown, 0]
        at = torch.linspace(-1.0, 1.0, CURVE, device=self.device).unsqueeze(-1)
        # One sequence for each of them: the same points, and then the question.
        question = torch.cat([at, functions.inputs[shown, 0, -1:].expand(CURVE, 1)], -1)
        before = functions.inputs[:shown, :1].expand(-1, CURVE, -1)
        inputs = torch.cat([before, question.unsqueeze(0)])
        mean, log_variance = self.output(model, inputs)[-1].unbind(-1)
        curves = {
            "model": (mean, (log_variance / 2).exp()),
            EXACT: self.process().predict(x, y, at),
        }
        return {
            "x": x.flatten().tolist(),
            "y": y.tolist(),
            "at": at.flatten().tolist(),
            "predictions": {
                name: {"mean": mean.tolist(), "standard_deviation": deviation.tolist()}
                for name, (mean, deviation) in curves.items()
            },
        }
