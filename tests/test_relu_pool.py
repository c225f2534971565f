"""The pooled sum of ReLUs, against its definition."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mann_ext import _library, backend, reference
from mann_ext.ops import relu_pool

native = pytest.mark.skipif(
    "relu_pool" not in _library.native_operators("cpu"), reason="native operators are not built"
)
# Odd and even, narrower and wider than two vectors, one of everything, and no image.
SHAPES = [
    (2, 3, 28, 28), (3, 2, 7, 7), (1, 1, 1, 1), (2, 1, 8, 5), (1, 2, 2, 3), (1, 1, 5, 70),
    (1, 1, 3, 33), (0, 2, 4, 4),
]  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
counts = pytest.mark.parametrize("count", [1, 2, 3])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def inputs(count: int, shape, dtype=torch.float64) -> list[torch.Tensor]:
    """Numbers of which half are clipped, many are alike and some are zero or minus zero."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(-4, 5, tuple(shape), generator=generator) / 2 for _ in range(count)]
    return [torch.where(x == 0, -x, x).to(dtype) for x in made]


def run(function, tensors) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of a weighted sum of it."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return (out.detach(), *torch.autograd.grad(out, tensors, grad.to(out)))


def assert_same(got, expected) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@shapes
@counts
@dtypes
def test_values_and_gradients_are_exactly_the_reference_s(shape, count, dtype):
    tensors = inputs(count, shape, dtype)
    assert_same(run(relu_pool, tensors), run(reference.relu_pool, tensors))


@given(st.integers(1, 3), st.lists(st.integers(1, 40), min_size=4, max_size=4))
def test_any_shape(count, shape):
    shape[0], shape[1] = shape[0] % 3 + 1, shape[1] % 4 + 1
    tensors = inputs(count, shape, torch.float32)
    assert_same(run(relu_pool, tensors), run(reference.relu_pool, tensors))


@counts
def test_nan_and_infinity_stay_what_they_are(count):
    tensors = inputs(count, (1, 4, 9, 7))
    tensors[0][0, 0, 3, 3] = tensors[0][0, 0, 8, 6] = tensors[0][0, 2, 8, 0] = math.nan
    tensors[0][0, 1, 2:4, 2:4] = math.nan
    tensors[-1][0, 3, 0, 0] = math.inf
    tensors[-1][0, 3, 5, 5] = -math.inf
    assert_same(run(relu_pool, tensors), run(reference.relu_pool, tensors))


def test_non_contiguous_inputs():
    tensors = [x.transpose(2, 3) for x in inputs(2, (2, 3, 6, 9), torch.float32)]
    assert_same(run(relu_pool, tensors), run(reference.relu_pool, tensors))


@counts
def test_first_and_second_derivatives(count):
    # All different, so that a small step changes no maximum.
    numbers = torch.randperm(count * 60).double().view(count, 2, 2, 3, 5)
    tensors = [(x / 10 - 3.05).requires_grad_() for x in numbers]
    assert torch.autograd.gradcheck(relu_pool, tensors)
    assert torch.autograd.gradgradcheck(relu_pool, tensors)


def test_transforms():
    a, b = inputs(2, (3, 2, 5, 4), torch.float32)
    expected = run(reference.relu_pool, [a, b])
    each = torch.func.vmap(lambda x, y: relu_pool(x.unsqueeze(0), y.unsqueeze(0)).squeeze(0))
    torch.testing.assert_close(each(a, b), expected[0])
    gradient = torch.func.grad(lambda x: relu_pool(x, b).sum())(a)
    torch.testing.assert_close(
        gradient, torch.func.grad(lambda x: reference.relu_pool(x, b).sum())(a)
    )
    with backend("reference"):
        assert_same(run(relu_pool, [a, b]), expected)
    assert relu_pool(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16


@native
def test_opcheck():
    a, b, _ = inputs(3, (2, 2, 5, 4), torch.float32)
    torch.library.opcheck(torch.ops.mann_ext.relu_pool.default, (a, b, None))
    out, where = torch.ops.mann_ext.relu_pool(a, b, None)
    torch.library.opcheck(
        torch.ops.mann_ext.relu_pool_backward.default, (torch.ones_like(out), where, 5, 4, 2)
    )


@native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_of_the_library(isa):
    program = (
        "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', "
        f"'exactly or nan', {__file__!r}]))"
    )
    environment = {**os.environ, "MANN_EXT_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


A = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "a to be a torch.Tensor, got None"),
        ((A, 3), TypeError, "b to be a torch.Tensor, got int"),
        ((A[0],), ValueError, r"a of shape \(B, C, H, W\), got \(3, 4, 5\)"),
        ((A, A[:1]), ValueError, r"b of shape \(2, 3, 4, 5\), got \(1, 3, 4, 5\)"),
        ((A, None, A), ValueError, "b where c is given"),
        ((A, A.double()), TypeError, "b of dtype torch.float32"),
        ((A.long(),), TypeError, "floating-point"),
        ((A[:, :, :0],), ValueError, r"at least one row and column, got \(2, 3, 0, 5\)"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        relu_pool(*arguments)
