"""A small LSTM over the gradients of very many coordinates (``coordinate_lstm``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mann_ext import _library, reference
from mann_ext.ops import _common
from mann_ext.ops.lstm import lstm_scan, needs_loop

__all__ = ["coordinate_lstm"]


def coordinate_lstm(
    gradients: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
) -> Tensor:
    """What an LSTM makes of each coordinate's T gradients (Andrychowicz et al., 2016)::

        x_t  = (log|g_t| / 7, sign g_t)   if |g_t| >= e^-7, else (-1, e^7 g_t)
        h_t  = LSTM(x_t, h_{t-1}),  h_0 = 0
        y    = w_out h_T + b_out

    The native kernel saves nothing but the gradients: the backward pass runs the steps again. Where
    ``gradients`` need a gradient themselves, on other devices and under torch.func it is
    :func:`lstm_scan` of x_t.

    Args:
        gradients: (T, P), finite, float32 or float64; all other tensors have its dtype.
        weight_ih, weight_hh, bias_ih, bias_hh: (4H, 2), (4H, H), (4H,) and (4H,), as ``nn.LSTM``.
        weight_out, bias_out: (1, H) and (1,), as ``nn.Linear``.

    Returns:
        y (P,).

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; the message says.

    Example:
        >>> import torch
        >>> from mann_ext.ops import coordinate_lstm
        >>> lstm, output = torch.nn.LSTM(2, 8), torch.nn.Linear(8, 1)
        >>> coordinate_lstm(torch.randn(5, 1000), *lstm.parameters(), *output.parameters()).shape
        torch.Size([1000])
    """
    inputs = (gradients, weight_ih, weight_hh, bias_ih, bias_hh, weight_out, bias_out)
    _check(*inputs)
    native = _library.use_native(gradients.device, "coordinate_lstm")
    if needs_loop() or not native or (gradients.requires_grad and torch.is_grad_enabled()):
        with _common.without_autocast(gradients.device):
            zeros = gradients.new_zeros(gradients.shape[1], weight_hh.shape[1])
            features = reference.gradient_features(gradients)
            h = lstm_scan(features, zeros, zeros, weight_ih, weight_hh, bias_ih, bias_hh).h
            return F.linear(h, weight_out, bias_out).squeeze(-1)
    weights = torch.cat([weight_hh, weight_ih, (bias_ih + bias_hh).unsqueeze(1)], 1)
    output = torch.cat([weight_out.flatten(), bias_out])
    made: Tensor = _common.apply_directly(
        _CoordinateLSTM, gradients.detach().contiguous(), weights, output
    )
    return made


def _check(
    gradients: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor,
    weight_out: Tensor, bias_out: Tensor,
) -> None:  # fmt: skip
    op = "coordinate_lstm"
    others = {
        "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh,
        "weight_out": weight_out, "bias_out": bias_out,
    }  # fmt: skip
    for name, tensor in {"gradients": gradients, **others}.items():
        if tensor is None:
            raise TypeError(f"{op}: expected {name} to be a torch.Tensor, got None")
    _common.check_tensors(op, gradients=gradients, **others)
    _common.check_shape(op, "gradients", gradients, ("T", "P"))
    _common.check_shape(op, "weight_hh", weight_hh, ("4H", "H"))
    hidden = weight_hh.shape[1]
    if hidden < 1:
        raise ValueError(f"{op}: expected weight_hh with at least one column, got none")
    for name, shape in (
        ("weight_hh", (4 * hidden, hidden)), ("weight_ih", (4 * hidden, 2)),
        ("bias_ih", (4 * hidden,)), ("bias_hh", (4 * hidden,)), ("weight_out", (1, hidden)),
        ("bias_out", (1,)),
    ):  # fmt: skip
        _common.check_shape(op, name, others[name], shape, weight_hh=weight_hh)
    if gradients.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: expected gradients of dtype float32 or float64, got {gradients.dtype}; convert "
            "them with .float()"
        )
    for name, tensor in others.items():
        if tensor.dtype != gradients.dtype:
            raise TypeError(
                f"{op}: expected {name} of dtype {gradients.dtype} as gradients are, got "
                f"{tensor.dtype}; convert it with .to({gradients.dtype})"
            )
    _common.check_same_device(op, gradients, **others)


class _CoordinateLSTM(torch.autograd.Function):
    @staticmethod
    def forward(gradients: Any, weights: Any, output: Any) -> Tensor:
        return torch.ops.mann_ext.coordinate_lstm(gradients, weights, output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, weights, output = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this will be wanted

            def run(weights: Tensor, output: Tensor) -> Tensor:
                return reference.coordinate_lstm(gradients, *_parts(weights, output))

            return (None, *torch.func.vjp(run, weights, output)[1](grad))
        return (
            None,
            *torch.ops.mann_ext.coordinate_lstm_backward(
                grad.contiguous(), gradients, weights, output
            ),
        )


def _parts(weights: Tensor, output: Tensor) -> tuple[Tensor, ...]:
    """The arguments of the reference in the two tensors of the kernel."""
    hidden = output.shape[0] - 1
    weight_hh, weight_ih, bias = weights.split([hidden, 2, 1], 1)
    bias = bias.squeeze(1)
    return (
        weight_ih, weight_hh, bias, torch.zeros_like(bias), output[:-1].unsqueeze(0), output[-1:]
    )  # fmt: skip


def _fake(gradients: Tensor, weights: Tensor, output: Tensor) -> Tensor:
    return gradients.new_empty(gradients.shape[1])


def _backward_fake(
    grad_out: Tensor, gradients: Tensor, weights: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(output)


if _library.native_available() and hasattr(torch.ops.mann_ext, "coordinate_lstm"):
    torch.library.register_fake("mann_ext::coordinate_lstm")(_fake)
    torch.library.register_fake("mann_ext::coordinate_lstm_backward")(_backward_fake)
