"""The LSTM over the gradients of many coordinates, against its definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mann_ext import _library, backend, reference
from mann_ext.ops import coordinate_lstm

NAMES = (
    "gradients", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_out", "bias_out",
)  # fmt: skip
native = pytest.mark.skipif(
    "coordinate_lstm" not in _library.native_operators("cpu"),
    reason="native operators are not built",
)
# Sizes around the blocks of 8 to 64 coordinates and the chunks of 512; H around fours.
SIZES = [(2, 5, 3), (5, 63, 20), (3, 65, 4), (7, 130, 6), (2, 4097, 5), (20, 513, 20)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def inputs(steps: int, count: int, hidden: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Gradients from 1e-9 to 1e5 with zeros among them, and weights as networks have them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    powers = torch.rand(steps, count, generator=generator, dtype=torch.float64) * 14 - 9
    gradients = normal(steps, count) * 10**powers
    gradients[:, ::7] = 0
    weights = [
        normal(4 * hidden, 2), normal(4 * hidden, hidden) / hidden**0.5, normal(4 * hidden),
        normal(4 * hidden), normal(1, hidden), normal(1),
    ]  # fmt: skip
    return [x.to(dtype) for x in (gradients, *weights)]


def run(function, tensors) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of a fixed weighted sum of it by the weights."""
    gradients, *weights = [tensor.detach().clone() for tensor in tensors]
    for weight in weights:
        weight.requires_grad_()
    out = function(gradients, *weights)
    generator = torch.Generator().manual_seed(1)
    # Positive: the gradient of the last bias is their sum, which must not be all cancellation.
    grad = torch.rand(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, weights, grad))


@sizes
def test_float64_is_the_reference(size):
    tensors = inputs(*size)
    for got, expected in zip(
        run(coordinate_lstm, tensors), run(reference.coordinate_lstm, tensors), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("zeros", [slice(0), slice(3, 4), slice(3, 5), slice(1, None), slice(None)])
def test_coordinates_without_a_gradient(zeros):
    """Run once for all of them: none, one, some, all but one, all."""
    tensors = inputs(3, 700, 4)
    tensors[0] = tensors[0].abs() + 1e-9
    tensors[0][:, zeros] = 0
    for got, expected in zip(
        run(coordinate_lstm, tensors), run(reference.coordinate_lstm, tensors), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@sizes
def test_float32_is_as_exact_as_the_reference_in_float32(size):
    tensors = inputs(*size, dtype=torch.float32)
    exact = run(reference.coordinate_lstm, [x.double() for x in tensors])
    plain = run(reference.coordinate_lstm, tensors)
    found = run(coordinate_lstm, tensors)

    def error(values) -> float:
        """Of all together: a single one may be exact by luck."""
        pairs = zip(values, exact, strict=True)
        return sum(((x - y).norm() / y.norm()).item() ** 2 for x, y in pairs) ** 0.5

    assert error(found) <= 2 * error(plain)


def test_first_and_second_derivatives_by_weights():
    gradients, *weights = inputs(3, 6, 3)
    weights = [weight.requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(lambda *w: coordinate_lstm(gradients, *w), weights)
    assert torch.autograd.gradgradcheck(lambda *w: coordinate_lstm(gradients, *w), weights)


def test_derivatives_by_gradients():
    tensors = [torch.randn(2, 4, dtype=torch.float64), *inputs(2, 4, 3)[1:]]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(coordinate_lstm, tensors)


def test_it_is_an_lstm_and_a_linear_layer():
    lstm, output = torch.nn.LSTM(2, 8), torch.nn.Linear(8, 1)
    gradients = torch.randn(5, 40)
    features = reference.gradient_features(gradients)
    expected = output(lstm(features)[1][0][0]).squeeze(-1)
    made = coordinate_lstm(gradients, *lstm.parameters(), *output.parameters())
    torch.testing.assert_close(made, expected)


def test_under_transforms_and_without_kernels():
    tensors = inputs(3, 10, 4)
    expected = run(coordinate_lstm, tensors)

    def loss(weight_hh):
        return coordinate_lstm(*tensors[:2], weight_hh, *tensors[3:]).square().sum()

    found = torch.func.grad(loss)(tensors[2])
    weight = tensors[2].clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(loss(weight), weight)[0])
    with backend("reference"):
        for got, want in zip(run(coordinate_lstm, tensors), expected, strict=True):
            torch.testing.assert_close(got, want)


@native
def test_opcheck():
    gradients, weight_ih, weight_hh, bias, _, weight_out, bias_out = inputs(3, 10, 4)
    weights = torch.cat([weight_hh, weight_ih, bias[:, None]], 1)
    packed = (gradients, weights, torch.cat([weight_out[0], bias_out]))
    torch.library.opcheck(torch.ops.mann_ext.coordinate_lstm.default, packed)
    torch.library.opcheck(
        torch.ops.mann_ext.coordinate_lstm_backward.default, (torch.randn(10).double(), *packed)
    )


@native
def test_nothing_depends_on_the_threads():
    tensors = inputs(3, 20_000, 8, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(coordinate_lstm, tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_of_the_library(isa):
    environment = {**os.environ, "MANN_EXT_CPU_ISA": isa}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        __file__,
        "-k",
        "float64 or float32 or threads",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("hidden", [3, 20])
def test_no_coordinates_and_no_steps(hidden):
    _, *weights = inputs(1, 1, hidden)
    for weight in weights:
        weight.requires_grad_()
    made = coordinate_lstm(torch.empty(4, 0, dtype=torch.float64), *weights)
    assert made.shape == (0,)
    assert not any(g.any() for g in torch.autograd.grad(made.sum(), weights))
    made = coordinate_lstm(torch.empty(0, 5, dtype=torch.float64), *weights)
    torch.testing.assert_close(made, weights[-1].expand(5))
    *of_others, of_bias = torch.autograd.grad(made.sum(), weights)
    assert of_bias.item() == 5
    assert not any(g.any() for g in of_others)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_named(name):
    tensors = dict(zip(NAMES, inputs(3, 10, 4), strict=True))
    tensors[name] = tensors[name].unsqueeze(0)
    with pytest.raises(ValueError, match=f"coordinate_lstm: expected {name} of shape"):
        coordinate_lstm(**tensors)


def test_a_wrong_dtype_is_named():
    tensors = dict(zip(NAMES, inputs(3, 10, 4), strict=True))
    with pytest.raises(TypeError, match=r"weight_out of dtype torch.float64 as gradients are"):
        coordinate_lstm(**{**tensors, "weight_out": tensors["weight_out"].float()})
    with pytest.raises(TypeError, match=r"float32 or float64, got torch.bfloat16"):
        coordinate_lstm(**{**tensors, "gradients": tensors["gradients"].bfloat16()})
    with pytest.raises(TypeError, match=r"gradients to be a torch.Tensor, got None"):
        coordinate_lstm(**{**tensors, "gradients": None})
