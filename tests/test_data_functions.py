"""Random functions: drawn as promised, and learned by what models are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from mann_ext.data.functions import (
    FunctionSampler,
    GaussianProcess,
    GaussianProcessSampler,
    QuadraticSampler,
    least_squares,
    monomials,
)

PROCESS = GaussianProcess(lengthscale=0.7, standard_deviation=1.5, noise=0.2)
KERNEL = ConstantKernel(1.5**2) * RBF(0.7)


def process_sampler(seed: int = 0, **arguments: int) -> GaussianProcessSampler:
    arguments = {"dimensions": 2, "length": 5, "batch_size": 4, **arguments}
    return GaussianProcessSampler(PROCESS, seed=seed, **arguments)


def quadratic_sampler(seed: int = 0, **arguments: int) -> QuadraticSampler:
    return QuadraticSampler(**{"length": 5, "batch_size": 4, "seed": seed, **arguments})


def test_values_have_the_covariance_of_the_process() -> None:
    count = 4000
    functions = process_sampler(batch_size=count, length=4).sample()
    x, y = functions.x.double().numpy(), functions.targets.double().numpy()
    white = np.stack(
        [
            np.linalg.solve(
                np.linalg.cholesky(KERNEL(x[:, i]) + 0.2**2 * np.eye(4)),
                y[:, i],
            )
            for i in range(count)
        ]
    )
    # Five standard errors of a mean, a variance and a covariance of standard normal numbers.
    assert np.abs(white.mean(0)).max() < 5 / math.sqrt(count)
    covariance = white.T @ white / count
    assert np.abs(covariance - np.eye(4)).max() < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("sampler", [process_sampler, quadratic_sampler])
def test_points_are_uniform_in_the_box(sampler: Callable[..., FunctionSampler]) -> None:
    x = sampler(batch_size=500, length=20).sample().x.flatten(0, 1)
    assert x.shape == (10_000, 2)
    assert -1 <= x.min() < -0.99 < 0.99 < x.max() <= 1
    assert x.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 10_000)
    assert (x.square().mean(0) - 1 / 3).abs().max() < 5 * math.sqrt(4 / 45 / 10_000)


@pytest.mark.parametrize("sampler", [process_sampler, quadratic_sampler])
def test_a_step_shows_the_value_before(sampler: Callable[..., FunctionSampler]) -> None:
    inputs, targets = sampler().sample()
    assert inputs.shape == (5, 4, 3)
    assert targets.shape == (5, 4)
    assert inputs.dtype == targets.dtype == torch.float32
    assert torch.equal(inputs[1:, :, -1], targets[:-1])
    assert not inputs[0, :, -1].any()


@pytest.mark.parametrize("sampler", [process_sampler, quadratic_sampler])
def test_a_restored_sampler_goes_on_bit_for_bit(sampler: Callable[..., FunctionSampler]) -> None:
    first = sampler(seed=3)
    first.sample()
    state = first.state_dict()
    expected = [next(iter(first)) for _ in range(2)]
    other = sampler(seed=4)
    assert not torch.equal(other.sample().inputs, expected[0].inputs)
    other.load_state_dict(state)
    for functions in expected:
        assert all(map(torch.equal, other.sample(), functions))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_exact_process_against_scikit_learn(dimensions: int) -> None:
    functions = process_sampler(dimensions=dimensions, length=12, batch_size=3).sample()
    x, y = functions.x.transpose(0, 1), functions.targets.t()
    found = PROCESS.negative_log_likelihoods(x, y)
    at = torch.linspace(-1, 1, 7).unsqueeze(-1).repeat(1, dimensions)
    assert found.shape == (3, 12)
    for i in range(3):
        for t in range(12):
            oracle = GaussianProcessRegressor(KERNEL, alpha=0.2**2, optimizer=None)
            if t:
                oracle.fit(x[i, :t].double().numpy(), y[i, :t].double().numpy())
            mean, deviation = oracle.predict(x[i, t : t + 1].double().numpy(), return_std=True)
            variance = deviation.item() ** 2 + 0.2**2
            error = y[i, t].item() - mean.item()
            expected = 0.5 * (math.log(2 * math.pi * variance) + error**2 / variance)
            assert found[i, t].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        mean, deviation = PROCESS.predict(x[i, :11], y[i, :11], at)
        expected_mean, expected_deviation = oracle.predict(at.double().numpy(), return_std=True)
        np.testing.assert_allclose(mean, expected_mean, rtol=1e-6, atol=1e-6)
        variance = expected_deviation**2 + 0.2**2
        np.testing.assert_allclose(deviation.square(), variance, rtol=1e-6)


def test_quadratic_functions_have_uniform_coefficients_and_values_from_0_to_1() -> None:
    functions = quadratic_sampler(batch_size=1000, length=20).sample()
    assert functions.targets.min() >= 0
    assert functions.targets.max() <= 1
    terms = monomials(functions.x.double()).transpose(0, 1)
    values = (functions.targets.double().t() * 12 - 6).unsqueeze(-1)
    coefficients = torch.linalg.lstsq(terms, values).solution.squeeze(-1)
    # Values are rounded to float32, whose last bit is 6e-8 of them.
    residuals = (terms @ coefficients.unsqueeze(-1) - values).abs()
    assert residuals.max() < 12 * 6e-8
    assert 0.99 < coefficients.abs().max() < 1.001
    assert coefficients.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 1000)
    assert (coefficients.square().mean(0) - 1 / 3).abs().max() < 5 * math.sqrt(4 / 45 / 1000)


def test_the_terms_are_those_of_the_paper() -> None:
    expected = torch.tensor([4.0, 9.0, -6.0, 2.0, -3.0, 1.0])
    assert torch.equal(monomials(torch.tensor([2.0, -3.0])), expected)


def test_least_squares_against_numpy() -> None:
    functions = quadratic_sampler(batch_size=5, length=12).sample()
    x, y = functions.x.transpose(0, 1).double(), functions.targets.t().double()
    found = least_squares(x, y)
    assert found.shape == (5, 12)
    assert torch.equal(found[:, 0], torch.full((5,), 0.5, dtype=torch.float64))
    for i in range(5):
        terms = monomials(x[i]).numpy()
        for t in range(1, 12):
            coefficients = np.linalg.lstsq(terms[:t], y[i, :t].numpy() - 0.5, rcond=None)[0]
            assert found[i, t].item() == pytest.approx(0.5 + terms[t] @ coefficients, abs=1e-9)
    # Six points settle a quadratic; the rounding of the values to float32 is magnified a little.
    torch.testing.assert_close(found[:, 7:], y[:, 7:], rtol=0, atol=1e-4)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="expected length of at least 1, got 0"):
        process_sampler(length=0)
    with pytest.raises(ValueError, match="expected batch_size of at least 1, got -1"):
        quadratic_sampler(batch_size=-1)
    with pytest.raises(ValueError, match="expected lengthscale above 0, got 0"):
        GaussianProcess(lengthscale=0)
    with pytest.raises(ValueError, match="expected standard_deviation above 0, got nan"):
        GaussianProcess(1.0, standard_deviation=math.nan)
    with pytest.raises(ValueError, match="noise of at least 1e-4"):
        GaussianProcess(1.0, noise=0.0)


def test_many_points_with_the_least_noise_have_a_decomposition() -> None:
    process = GaussianProcess(lengthscale=2.0, noise=1e-4)
    sampler = GaussianProcessSampler(process, dimensions=1, length=200, batch_size=8)
    x, y = sampler.sample().x.transpose(0, 1), sampler.sample().targets.t()
    assert process.negative_log_likelihoods(x, y).isfinite().all()
