"""The LSTM over a whole sequence: against nn.LSTM, and against the loop in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mann_ext import _library
from mann_ext.models import LSTMController
from mann_ext.ops import lstm_scan
from mann_ext.ops.lstm import lstm_loop

NAMES = ("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
native = pytest.mark.skipif(
    "lstm_scan" not in _library.native_operators("cpu"), reason="native operators are not built"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def inputs(
    steps: int = 5, batch: int = 3, width: int = 4, hidden: int = 6, dtype=torch.float64, seed=0
) -> list[torch.Tensor]:
    """x, h, c, weight_ih, weight_hh, bias_ih, bias_hh of the sizes that trained networks have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [normal(4 * hidden, n, scale=n**-0.5) for n in (width, hidden)]
    biases = [normal(4 * hidden), normal(4 * hidden)]
    return [normal(steps, batch, width), normal(batch, hidden), normal(batch, hidden)] + (
        weights + biases
    )


def resets(steps: int, batch: int) -> torch.Tensor:
    return torch.rand(steps, batch, generator=torch.Generator().manual_seed(2)) < 0.3


def run(function, tensors, reset=None) -> tuple[torch.Tensor, ...]:
    """Three outputs, then the gradients of a fixed weighted sum of them to all inputs."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = tuple(function(*tensors, reset))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    total = sum((y * w.to(y.dtype)).sum() for y, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
    return (*(y.detach() for y in outputs), *found)


def check(tensors, reset=None) -> None:
    """float64: equal to the loop; float32: at most twice its error, root mean square.

    Of few numbers the loop may have most right by chance: some roundings are granted there.
    """
    dtype = tensors[0].dtype
    exact = run(lstm_loop, [tensor.double() for tensor in tensors], reset)
    got = run(lstm_scan, tensors, reset)
    loop = run(lstm_loop, tensors, reset)
    for i, (a, b, c) in enumerate(zip(got, loop, exact, strict=True)):
        name = ("hidden", "h_out", "c_out", *NAMES)[i]
        assert a.shape == c.shape, name
        assert a.dtype == dtype, name
        if a.numel() == 0:
            continue
        if dtype == torch.float64:
            scale = c.abs().max().item()
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-13 + 1e-13 * scale, msg=name)
        else:
            error, allowed = (a - c).norm().item(), 2 * (b - c).norm().item()
            if a.numel() < 1000:
                allowed += 16 * 2**-24 * c.norm().item()
            assert error <= allowed, (name, error, allowed)


@dtypes
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(50, 16, 405, 200), (5, 3, 4, 6), (3, 9, 70, 33), (2, 17, 1, 300), (1, 1, 1, 1)],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_loop(sizes, reset, dtype):
    check(inputs(*sizes, dtype=dtype), resets(*sizes[:2]) if reset else None)


@dtypes
@given(
    steps=st.sampled_from([0, 1, 2, 4]),
    batch=st.sampled_from([0, 1, 7, 9, 17]),
    width=st.sampled_from([1, 5, 405]),
    hidden=st.sampled_from([1, 3, 17, 200]),
    reset=st.booleans(),
    seed=st.integers(0, 100),
)
def test_odd_sizes(dtype, steps, batch, width, hidden, reset, seed):
    tensors = inputs(steps, batch, width, hidden, dtype, seed)
    check(tensors, resets(steps, batch) if reset else None)


def test_it_equals_the_lstm_of_pytorch():
    module = torch.nn.LSTM(4, 6, dtype=torch.float64)
    x, h, c = inputs()[:3]
    want, (last_h, last_c) = module(x, (h[None], c[None]))
    got = lstm_scan(x, h, c, *module.parameters())
    torch.testing.assert_close(tuple(got), (want, last_h[0], last_c[0]), rtol=1e-13, atol=1e-13)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(want.square().sum(), parameters)
    found = torch.autograd.grad(got.hidden.square().sum(), parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reset", [None, resets(3, 2)])
def test_first_and_second_derivatives(reset):
    tensors = [tensor.requires_grad_() for tensor in inputs(3, 2, 1, 2)]

    def function(*args):
        return tuple(lstm_scan(*args, reset))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_second_derivative_of_part_of_the_outputs_and_inputs():
    tensors = inputs()
    tensors[4].requires_grad_()

    def penalty(function):
        c = function(*tensors)[2]
        (grad,) = torch.autograd.grad(c.square().sum(), tensors[4], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors[4])[0]

    torch.testing.assert_close(penalty(lstm_scan), penalty(lstm_loop))


@native
@pytest.mark.parametrize("need_x_grad", [False, True])
@pytest.mark.parametrize("reset", [None, resets(5, 3)])
def test_opcheck(reset, need_x_grad):
    tensors = inputs()
    forward = torch.ops.mann_ext.lstm_scan.default
    torch.library.opcheck(forward, (*tensors, reset, True))
    torch.library.opcheck(forward, (*tensors, reset, False))
    hidden, h, _, gates, cells = forward(*tensors, reset, True)
    grads = (torch.ones_like(hidden), torch.ones_like(h), None)
    torch.library.opcheck(
        torch.ops.mann_ext.lstm_scan_backward.default,
        (*grads, *tensors[:5], reset, hidden, gates, cells, need_x_grad),
    )


@native
def test_an_input_without_gradient_gets_none_computed():
    tensors = inputs()
    hidden, _, _, gates, cells = torch.ops.mann_ext.lstm_scan(*tensors, None, True)
    grad_x = torch.ops.mann_ext.lstm_scan_backward(
        hidden, None, None, *tensors[:5], None, hidden, gates, cells, False
    )[0]
    assert grad_x.numel() == 0


@pytest.mark.parametrize("function", ["compile", "export"])
@pytest.mark.parametrize("reset", [False, True])
def test_compile_and_export_of_the_controller(function, reset):
    controller = LSTMController(4, 6, dtype=torch.float64)
    x, mask = inputs()[0], resets(5, 3) if reset else None
    if function == "export":
        changed = torch.export.export(controller, (x, None, mask)).module()
    else:
        changed = torch.compile(controller, fullgraph=True, backend="aot_eager")
    got, want = changed(x, None, mask)[0], controller(x, None, mask)[0]
    torch.testing.assert_close(got, want)
    if function == "compile":
        parameters = list(controller.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(want.square().sum(), parameters),
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_func_grad(compiled):
    tensors = inputs()

    def loss(weight):
        return lstm_scan(*tensors[:4], weight, *tensors[5:]).hidden.square().sum()

    gradient = torch.func.grad(loss)
    if compiled:
        gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    weight = tensors[4].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(gradient(tensors[4]), want)


def test_vmap_and_forward_mode_run_in_plain_operations():
    tensors = inputs()
    x = torch.stack([tensors[0], tensors[0] + 1])
    got = torch.func.vmap(lambda x: lstm_scan(x, *tensors[1:]).hidden)(x)
    torch.testing.assert_close(got[1], lstm_scan(x[1], *tensors[1:]).hidden)
    tangent = torch.func.jvp(
        lambda h: lstm_scan(tensors[0], h, *tensors[2:]).c, (tensors[1],), (tensors[1],)
    )[1]
    assert tangent.shape == tensors[2].shape
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[1], tensors[1])
        c = lstm_scan(tensors[0], dual, *tensors[2:]).c
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(c).tangent, tangent)


def test_pieces_with_the_state_carried_equal_the_whole():
    x, h, c, *weights = inputs(steps=9)
    whole = lstm_scan(x, h, c, *weights)
    pieces = []
    for start, end in pairwise([0, 4, 4, 5, 9]):
        piece, h, c = lstm_scan(x[start:end], h, c, *weights)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces), whole.hidden)
    torch.testing.assert_close((h, c), (whole.h, whole.c))


@dtypes
def test_a_reset_forgets_everything_even_nan(dtype):
    x, h, c, *weights = (tensor.requires_grad_() for tensor in inputs(4, 2, dtype=dtype))
    with torch.no_grad():
        h[1], c[1] = torch.nan, torch.nan
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[0, 1] = True
    output = lstm_scan(x, h, c, *weights, reset)
    for grad in torch.autograd.grad(output.hidden.sum(), (x, h, c, *weights)):
        assert grad.isfinite().all()
    zeros = torch.zeros_like(h)
    torch.testing.assert_close(output.hidden[:, 1], lstm_scan(x, zeros, zeros, *weights)[0][:, 1])


@dtypes
@pytest.mark.parametrize("value", [1e4, 1e30])
def test_huge_gates_saturate(value, dtype):
    tensors = inputs(dtype=dtype)
    tensors[0] = tensors[0].sign() * value
    got = run(lstm_scan, tensors)
    want = run(lstm_loop, [tensor.double() for tensor in tensors])
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert all(a.isfinite().all() for a in got[:3])


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(7))
def test_nan_and_infinity_end_up_where_the_loop_has_them(where, value, dtype):
    tensors = inputs(4, 11, 5, 19, dtype=dtype)
    tensors[where].view(-1)[3] = value
    for a, b in zip(run(lstm_scan, tensors)[:3], run(lstm_loop, tensors)[:3], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


@dtypes
def test_small_gates_keep_their_digits(dtype):
    """tanh(x) is x for a tiny x: one of 1e-6 must not come out as a multiple of 2**-24."""
    x, h, c, weight_ih, weight_hh, bias, _ = map(torch.zeros_like, inputs(1, 1, 1, 64, dtype))
    cell = c + torch.logspace(-9, 1, 64, dtype=dtype)
    # The forget gate open and the input gate closed, c_1 = c_0; the output gate half open.
    bias[:64], bias[64:128] = -100, 100
    got = lstm_scan(x, h, cell, weight_ih, weight_hh, bias, torch.zeros_like(bias))
    torch.testing.assert_close(got.c, cell, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.h, cell.tanh() / 2, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_inputs_of_any_strides_and_expanded_gradients():
    tensors = inputs()
    strided = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in strided)
    reset = resets(3, 5).t()
    want = lstm_scan(*tensors, reset.contiguous())
    torch.testing.assert_close(tuple(lstm_scan(*strided, reset)), tuple(want), rtol=0, atol=0)
    weight = tensors[4].requires_grad_()
    (grad,) = torch.autograd.grad(lstm_scan(*tensors).hidden.sum(), weight)
    (wanted,) = torch.autograd.grad(lstm_loop(*tensors)[0].sum(), weight)
    torch.testing.assert_close(grad, wanted)


@native
@dtypes
@pytest.mark.parametrize("batch", [1, 9, 16, 33])
def test_results_do_not_depend_on_the_number_of_threads(batch, dtype):
    tensors, reset = inputs(6, batch, 70, 45, dtype), resets(6, batch)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(lstm_scan, tensors, reset))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_of_the_library(isa):
    environment = {**os.environ, "MANN_EXT_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-x", __file__]
    command += ["-k", "(loop and not 405) or odd or threads or reset or saturate or digits"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("name", [*NAMES[1:], "reset"])
def test_a_wrong_shape_is_named(name):
    tensors = dict(zip((*NAMES, "reset"), [*inputs(), resets(5, 3)], strict=True))
    tensors[name] = tensors[name].unsqueeze(0)
    with pytest.raises(ValueError, match=f"lstm_scan: expected {name} of shape"):
        lstm_scan(**tensors)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_wrong_dtype_is_named(name):
    tensors = dict(zip(NAMES, inputs(), strict=True))
    tensors[name] = tensors[name].float()
    with pytest.raises(TypeError, match=rf"expected {name} of dtype torch.float64 as x is"):
        lstm_scan(**tensors)


def test_other_bad_input_is_named():
    tensors = dict(zip(NAMES, inputs(), strict=True))
    with pytest.raises(ValueError, match=r"x of shape \(T, B, I\)"):
        lstm_scan(**{**tensors, "x": tensors["x"][0]})
    with pytest.raises(TypeError, match=r"expected c to be a torch.Tensor, got None"):
        lstm_scan(**{**tensors, "c": None})
    with pytest.raises(TypeError, match=r"expected h to be a torch.Tensor, got list"):
        lstm_scan(**{**tensors, "h": [1.0]})
    with pytest.raises(TypeError, match=r"x of dtype float32 or float64, got torch.bfloat16"):
        lstm_scan(**{name: tensor.bfloat16() for name, tensor in tensors.items()})
    with pytest.raises(TypeError, match="reset of dtype bool"):
        lstm_scan(**tensors, reset=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="c on cpu as x is, got meta"):
        lstm_scan(**{**tensors, "c": tensors["c"].to("meta")})
    with pytest.raises(ValueError, match="at least one column"):
        lstm_scan(**{**tensors, "x": tensors["x"][:, :, :0]})


@native
def test_the_direct_call_of_the_raw_operator_is_checked_too():
    tensors = inputs()
    with pytest.raises(ValueError, match="weight_hh"):
        torch.ops.mann_ext.lstm_scan(*tensors[:4], tensors[4][1:], *tensors[5:], None, True)
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.mann_ext.lstm_scan(tensors[0].mT.contiguous().mT, *tensors[1:], None, True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_controller_fused_and_looped_agree(backend):
    """By the native operator and, in the reference backend, by PyTorch's fused LSTM."""
    fused = LSTMController(4, 6, dtype=torch.float64, fused=True)
    looped = LSTMController(4, 6, dtype=torch.float64, fused=False)
    looped.load_state_dict(fused.state_dict())
    x, mask = inputs()[0], resets(5, 3)
    for reset in (None, mask, torch.ones_like(mask)):
        with _library.backend(backend):
            hidden, state = fused(x, None, reset)
            want, last = looped(x, None, reset)
        torch.testing.assert_close((hidden, *state), (want, *last))
        for function in (torch.sum, torch.linalg.vector_norm):
            found, wanted = (
                torch.autograd.grad(function(h), list(m.parameters()), create_graph=True)
                for h, m in ((hidden, fused), (want, looped))
            )
            torch.testing.assert_close(found, wanted)
        penalties = [
            torch.autograd.grad(sum(g.square().sum() for g in grads), list(m.parameters()))
            for grads, m in ((found, fused), (wanted, looped))
        ]
        torch.testing.assert_close(*penalties)
