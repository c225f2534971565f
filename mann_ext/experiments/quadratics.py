"""Never-seen quadratic functions, learned by an LSTM whose weights are frozen.

From Hochreiter, Younger & Conwell (2001).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mann_ext.data.functions import Functions, FunctionSampler, QuadraticSampler, least_squares
from mann_ext.experiments.function_task import FunctionTask
from mann_ext.experiments.functions import QuadraticsConfig


class Quadratics(FunctionTask):
    """The model's output is the next value of a quadratic function of two variables.

    It is compared with a quadratic fitted by least squares to the points before, which is exact
    from six points on, and with the mean of the values before.
    """

    config: QuadraticsConfig
    metric = "mse"
    outputs = 1
    data_name = "quadratic functions of 2 variables"

    def sampler(self, seed: int) -> FunctionSampler:
        """Quadratic functions."""
        episodes = self.config.episodes
        return QuadraticSampler(
            length=episodes.length, batch_size=episodes.batch_size, seed=seed, device=self.device
        )

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The squared error."""
        return (outputs.squeeze(-1) - targets).square()

    def baselines(self, functions: Functions) -> dict[str, Tensor]:
        """Least squares, and the mean of the values before (of none: 1/2, the mean of all)."""
        targets = functions.targets.double()
        fitted = least_squares(functions.x.transpose(0, 1), targets.t()).t()
        counts = torch.arange(1, len(targets), device=targets.device).unsqueeze(-1)
        means = torch.full_like(targets, 0.5)
        means[1:] = targets.cumsum(0)[:-1] / counts
        return {
            "least squares": (fitted - targets).square(),
            "mean of earlier values": (means - targets).square(),
        }
