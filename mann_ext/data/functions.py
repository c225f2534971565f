"""Random functions to be learned from their points: of a Gaussian process, and quadratic ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FunctionSampler",
    "Functions",
    "GaussianProcess",
    "GaussianProcessSampler",
    "QuadraticSampler",
    "least_squares",
    "monomials",
]


class Functions(NamedTuple):
    """Points of a batch of functions.

    inputs (T, B, D + 1) float32: [x_t, y_{t-1}], the value before being 0 at t = 0; targets
    (T, B) float32: y_t.
    """

    inputs: Tensor
    targets: Tensor

    @property
    def x(self) -> Tensor:
        """Where the functions were evaluated, (T, B, D)."""
        return self.inputs[..., :-1]


class FunctionSampler:
    """Draws batches of functions and points of each, endlessly, from its own random numbers.

    The points x_t are uniform in the box [-1, 1]^D.

    Args:
        dimensions: D.
        length: T, points of each function.
        batch_size: B.
        seed: of the random numbers.
        device: where batches are made.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dimensions: int,
        length: int,
        batch_size: int = 16,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"dimensions": dimensions, "length": length, "batch_size": batch_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} of at least 1, got {value}"
                )
        self.dimensions, self.length, self.batch_size = dimensions, length, batch_size
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def values(self, x: Tensor) -> Tensor:
        """x (B, T, D) float64 -> y (B, T), of a new function for each row."""
        raise NotImplementedError

    def sample(self) -> Functions:
        """The next batch."""
        x = self._uniform(self.batch_size, self.length, self.dimensions)
        y = self.values(x)
        before = F.pad(y, (1, -1))
        inputs = torch.cat([x, before.unsqueeze(-1)], -1)
        return Functions(inputs.transpose(0, 1).float().contiguous(), y.t().float().contiguous())

    def __iter__(self) -> Iterator[Functions]:
        while True:
            yield self.sample()

    def state_dict(self) -> dict[str, Any]:
        """All that the coming batches depend on beside the arguments."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bit for bit, where the sampler that gave ``state`` was."""
        self._generator.set_state(state["generator"].cpu())

    def _uniform(self, *shape: int) -> Tensor:
        """Numbers in [-1, 1)."""
        numbers = torch.rand(
            shape, generator=self._generator, device=self.device, dtype=torch.float64
        )
        return numbers * 2 - 1

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(
            shape, generator=self._generator, device=self.device, dtype=torch.float64
        )


class GaussianProcess:
    """A Gaussian process with mean 0 whose hyper-parameters are known.

    The covariance of two values is k(x, x') = sd^2 exp(-|x - x'|^2 / (2 lengthscale^2)), and each
    observed value y has independent Gaussian noise. Computes in float64 by a Cholesky
    decomposition of the covariance of all points, O(T^3).

    Args:
        lengthscale: distance over which the functions change.
        standard_deviation: sd, of the functions.
        noise: standard deviation of the noise, at least 1e-4 of the functions' (with less the
            covariance may not have a Cholesky decomposition).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, lengthscale: float, standard_deviation: float = 1.0, noise: float = 0.1
    ) -> None:
        positive = {"lengthscale": lengthscale, "standard_deviation": standard_deviation}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"GaussianProcess: expected {name} above 0, got {value}")
        if not noise >= 1e-4 * standard_deviation:
            raise ValueError(
                f"GaussianProcess: expected noise of at least 1e-4 of the standard deviation "
                f"{standard_deviation}, got {noise}"
            )
        self.lengthscale, self.standard_deviation = lengthscale, standard_deviation
        self.noise = noise

    def kernel(self, x: Tensor, other: Tensor) -> Tensor:
        """Covariances (..., T, S) of the values at x (..., T, D) and other (..., S, D)."""
        distance = (x.unsqueeze(-2) - other.unsqueeze(-3)).square().sum(-1)
        return self.standard_deviation**2 * (distance / (-2 * self.lengthscale**2)).exp()

    def cholesky(self, x: Tensor) -> Tensor:
        """L (..., T, T), where L L^T is the covariance of observations at x (..., T, D)."""
        covariance = self.kernel(x, x)
        covariance.diagonal(dim1=-2, dim2=-1).add_(self.noise**2)
        return torch.linalg.cholesky(covariance)

    def negative_log_likelihoods(self, x: Tensor, y: Tensor) -> Tensor:
        """-log p(y_t | x_t and the points before it), (B, T) float64, of x (B, T, D) and y (B, T).

        With L z = y, z_t is y_t less its predicted mean, over its predicted standard deviation
        L_tt: row t of L depends on the points up to t alone.
        """
        factor = self.cholesky(x.double())
        z = torch.linalg.solve_triangular(factor, y.double().unsqueeze(-1), upper=False)
        scale = factor.diagonal(dim1=-2, dim2=-1)
        return 0.5 * (z.squeeze(-1).square() + math.log(2 * math.pi)) + scale.log()

    def predict(self, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (..., S) of observations at ``at`` (..., S, D), the noise
        included, given those at x (..., T, D), y (..., T)."""
        x, y, at = x.double(), y.double(), at.double()
        factor = self.cholesky(x)
        across = torch.linalg.solve_triangular(factor, self.kernel(x, at), upper=False)
        z = torch.linalg.solve_triangular(factor, y.unsqueeze(-1), upper=False)
        variance = self.standard_deviation**2 + self.noise**2 - across.square().sum(-2)
        return (across * z).sum(-2), variance.sqrt()


class GaussianProcessSampler(FunctionSampler):
    """Draws functions of a Gaussian process, observed with its noise.

    Args:
        process: what to draw from.
        **arguments: of :class:`FunctionSampler`.

    Example:
        >>> process = GaussianProcess(lengthscale=0.4)
        >>> sampler = GaussianProcessSampler(process, dimensions=2, length=50)
        >>> inputs, targets = sampler.sample()
        >>> inputs.shape, targets.shape
        (torch.Size([50, 16, 3]), torch.Size([50, 16]))
    """

    def __init__(self, process: GaussianProcess, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.process = process

    def values(self, x: Tensor) -> Tensor:
        return (self.process.cholesky(x) @ self._normal(*x.shape[:2], 1)).squeeze(-1)


class QuadraticSampler(FunctionSampler):
    """Draws quadratic functions of two variables (Hochreiter, Younger & Conwell 2001).

    y = (a x1^2 + b x2^2 + c x1 x2 + d x1 + e x2 + f + 6) / 12, the coefficients uniform in [-1, 1],
    so y is in [0, 1].

    Args:
        **arguments: of :class:`FunctionSampler`, without the dimensions.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(dimensions=2, **arguments)

    def values(self, x: Tensor) -> Tensor:
        terms = monomials(x)
        coefficients = self._uniform(terms.shape[0], terms.shape[-1], 1)
        return ((terms @ coefficients).squeeze(-1) / terms.shape[-1] + 1) / 2


def monomials(x: Tensor) -> Tensor:
    """x (..., 2) -> [x1^2, x2^2, x1 x2, x1, x2, 1] (..., 6)."""
    first, second = x.unbind(-1)
    parts = [first**2, second**2, first * second, first, second, torch.ones_like(first)]
    return torch.stack(parts, -1)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """Predictions of y (B, T) by quadratics that are fitted to the points before, (B, T) float64.

    x (B, T, 2). While there are fewer points than coefficients, those of y - 1/2 are the smallest
    that fit, as y is spread around 1/2.
    """
    terms, centred = monomials(x.double()), y.double().unsqueeze(-1) - 0.5
    predictions = [torch.zeros_like(centred[:, 0, 0])]
    for t in range(1, x.shape[1]):
        coefficients = torch.linalg.pinv(terms[:, :t]) @ centred[:, :t]
        predictions.append((terms[:, t : t + 1] @ coefficients).flatten())
    return torch.stack(predictions, 1) + 0.5
