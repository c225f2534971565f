"""An LSTM layer over a whole sequence (``lstm_scan``)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mann_ext import _library
from mann_ext.ops import _common

__all__ = ["LSTMScanOutput", "lstm_cell", "lstm_loop", "lstm_scan"]

RESIDENT = {torch.float32: 256, torch.float64: 128}
"""Most hidden units whose recurrent weights a cluster of a GPU keeps in its registers."""
ONE_BLOCK = 32
"""Most of them that need no cluster (compute capability 9)."""


class LSTMScanOutput(NamedTuple):
    """h of every step (T, B, H), and h and c (B, H) after the last."""

    hidden: Tensor
    h: Tensor
    c: Tensor


def lstm_scan(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None = None,
) -> LSTMScanOutput:
    """T steps of an LSTM (Hochreiter and Schmidhuber, 1997; with forget gates, Gers et al., 2000).

    Each step, with the parameters of one layer of ``nn.LSTM``::

        i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)

    The native kernels compute no gradient for an ``x`` that needs none. Without one for the device,
    under torch.func and in forward mode the steps run in plain operations.

    Args:
        x: (T, B, I), float32 or float64; all other tensors have its dtype.
        h, c: (B, H), the state before the first step.
        weight_ih: (4H, I).
        weight_hh: (4H, H).
        bias_ih, bias_hh: (4H,).
        reset: (T, B) bool: where True, h and c are zero before step t, whatever they were (NaN
            too).

    Returns:
        hidden (T, B, H), and h and c after the last step.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; the message says.

    Example:
        >>> import torch
        >>> from mann_ext.ops import lstm_scan
        >>> lstm, zeros = torch.nn.LSTM(6, 8), torch.zeros(3, 8)
        >>> output = lstm_scan(torch.randn(5, 3, 6), zeros, zeros, *lstm.parameters())
        >>> output.hidden.shape, output.c.shape
        (torch.Size([5, 3, 8]), torch.Size([3, 8]))
    """
    _check(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, reset)
    inputs = (x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    if needs_loop() or not _library.use_native(x.device, "lstm_scan"):
        with _common.without_autocast(x.device):
            return LSTMScanOutput(*lstm_loop(*inputs, reset))
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    arguments = [tensor.contiguous() for tensor in inputs]
    if torch.compiler.is_compiling():
        # It does not always see what torch.func.grad differentiates, and refuses one tensor given
        # twice, as h and c may be.
        save = torch.is_grad_enabled()
        arguments = [tensor.view_as(tensor) for tensor in arguments]
    output = _common.apply_directly(_Scan, *arguments, _contiguous(reset), save)
    return LSTMScanOutput(*output[:3])


def is_resident(x: Tensor, hidden: int) -> bool:
    """Whether all steps of :func:`lstm_scan` are one kernel launch on the GPU that x is on."""
    return hidden <= RESIDENT.get(x.dtype, 0) and (
        hidden <= ONE_BLOCK or torch.cuda.get_device_properties(x.device).major >= 9
    )


def needs_loop() -> bool:
    """Whether a torch.func transform or forward mode is at work: only plain operations allow it."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def lstm_loop(
    x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor,
    bias_hh: Tensor, reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`lstm_scan` in plain operations, unchecked: any device, dtype and transform."""
    if x.shape[0] == 0:
        return x.new_zeros(0, *h.shape), h, c
    transposed, outputs = weight_hh.t(), []
    # unbind, not [t]: the gradient of an index is as large as the whole.
    for t, projected in enumerate(F.linear(x, weight_ih, bias_ih + bias_hh).unbind()):
        if reset is not None:
            ended = reset[t].unsqueeze(-1)
            h, c = h.masked_fill(ended, 0.0), c.masked_fill(ended, 0.0)
        h, c = lstm_cell(projected, h, c, transposed)
        outputs.append(h)
    return torch.stack(outputs), h, c


def lstm_cell(
    projected: Tensor, inner: Tensor, c: Tensor, transposed_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gates = projected + inner @ transposed_weight, in PyTorch's order i, f, g, o -> h and c."""
    hidden = c.shape[-1]
    gates = torch.addmm(projected, inner, transposed_weight)
    i_and_f, g, o = gates.split([2 * hidden, hidden, hidden], -1)
    i, f = i_and_f.sigmoid().chunk(2, -1)
    c = f * c + i * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _check(
    x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor,
    bias_hh: Tensor, reset: Tensor | None,
) -> None:  # fmt: skip
    op = "lstm_scan"
    others = {
        "h": h, "c": c, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih,
        "bias_hh": bias_hh,
    }  # fmt: skip
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            raise TypeError(f"{op}: expected {name} to be a torch.Tensor, got None")
    _common.check_tensors(op, x=x, **others, reset=reset)
    _common.check_shape(op, "x", x, ("T", "B", "I"))
    _common.check_shape(op, "h", h, (x.shape[1], "H"), x=x)
    steps, batch, width = x.shape
    hidden = h.shape[1]
    if min(width, hidden) < 1:
        raise ValueError(
            f"{op}: expected x and h with at least one column, got {width} and {hidden}"
        )
    _common.check_shape(op, "c", c, (batch, hidden), h=h)
    _common.check_shape(op, "weight_ih", weight_ih, (4 * hidden, width), x=x, h=h)
    _common.check_shape(op, "weight_hh", weight_hh, (4 * hidden, hidden), h=h)
    _common.check_shape(op, "bias_ih", bias_ih, (4 * hidden,), h=h)
    _common.check_shape(op, "bias_hh", bias_hh, (4 * hidden,), h=h)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: expected x of dtype float32 or float64, got {x.dtype}; convert it with .float()"
        )
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: expected {name} of dtype {x.dtype} as x is, got {tensor.dtype}; convert it "
                f"with .to({x.dtype})"
            )
    if reset is not None:
        _common.check_shape(op, "reset", reset, (steps, batch), x=x)
        if reset.dtype != torch.bool:
            raise TypeError(
                f"{op}: expected reset of dtype bool, got {reset.dtype}; use reset.bool()"
            )
    for name, tensor in {**others, **({} if reset is None else {"reset": reset})}.items():
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: expected {name} on {x.device} as x is, got {tensor.device}; move it with "
                f".to({str(x.device)!r})"
            )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Scan(torch.autograd.Function):
    """The raw operator; the activated gates and the cells are saved for the backward pass."""

    @staticmethod
    def forward(
        x: Any, h: Any, c: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any,
        reset: Any, save_for_backward: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.lstm_scan(
            x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, reset, save_for_backward
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8], hidden, gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x_grad = ctx.needs_input_grad[0]
        grad_x, *others, grad_bias = _common.apply_directly(
            _ScanBackward, *map(_contiguous, grads[:3]), *ctx.saved_tensors, need_x_grad
        )
        return grad_x if need_x_grad else None, *others, grad_bias, grad_bias, None, None


class _ScanBackward(torch.autograd.Function):
    """The hand-written backward pass; its own derivative recomputes through the loop."""

    @staticmethod
    def forward(
        grad_hidden: Any, grad_h_out: Any, grad_c_out: Any, x: Any, h: Any, c: Any,
        weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, reset: Any, hidden: Any,
        gates: Any, cells: Any, need_x_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.lstm_scan_backward(
            grad_hidden, grad_h_out, grad_c_out, x, h, c, weight_ih, weight_hh, reset, hidden,
            gates, cells, need_x_grad,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:11])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, reset = ctx.saved_tensors
        present = [i for i, tensor in enumerate(inputs) if tensor is not None]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            full = dict(zip(present, values, strict=True))
            outputs, pullback = torch.func.vjp(
                partial(lstm_loop, reset=reset), *(full[i] for i in range(3, 10))
            )[:2]
            return pullback(
                tuple(full.get(i, torch.zeros_like(out)) for i, out in enumerate(outputs))
            )[:6]  # the second bias has the gradient of the first

        results, pullback = torch.func.vjp(first_order, *(inputs[i] for i in present))[:2]
        found = pullback(
            tuple(
                torch.zeros_like(result) if grad is None or grad.shape != result.shape else grad
                for grad, result in zip(grads, results, strict=True)
            )
        )
        out: list[Tensor | None] = [None] * 15
        for i, grad in zip(present, found, strict=True):
            out[i] = grad
        return tuple(out)


def _scan_fake(
    x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor,
    bias_hh: Tensor, reset: Tensor | None, save_for_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (steps, batch, _), hidden = x.shape, h.shape[1]
    saved = [x.new_empty(0), x.new_empty(0)]
    if save_for_backward:
        saved = [x.new_empty(steps, batch, 4 * hidden), x.new_empty(steps, batch, hidden)]
    return x.new_empty(steps, batch, hidden), torch.empty_like(h), torch.empty_like(c), *saved


def _scan_backward_fake(
    grad_hidden: Tensor | None, grad_h_out: Tensor | None, grad_c_out: Tensor | None, x: Tensor,
    h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, reset: Tensor | None,
    hidden: Tensor, gates: Tensor, cells: Tensor, need_x_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        torch.empty_like(x) if need_x_grad else x.new_empty(0),
        *map(torch.empty_like, (h, c, weight_ih, weight_hh)),
        x.new_empty(weight_ih.shape[0]),
    )


if _library.native_available():
    torch.library.register_fake("mann_ext::lstm_scan")(_scan_fake)
    torch.library.register_fake("mann_ext::lstm_scan_backward")(_scan_backward_fake)
