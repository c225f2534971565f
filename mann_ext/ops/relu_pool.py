"""The sum of ReLUs, pooled: a layer with fast weights and the pooling after it (``relu_pool``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mann_ext import _library, reference
from mann_ext.ops import _common
from mann_ext.ops.lstm import needs_loop

__all__ = ["relu_pool"]


def relu_pool(a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
    """The largest of each 2 x 2 window of a sum of ReLUs::

        y = maxpool(relu(a) + relu(b) + relu(c))

    which is what layer augmentation (Munkhdalai and Yu, 2017) makes of a convolution by slow and
    fast weights. Windows do not overlap; an odd row or column at the end has a window of its own.
    NaN in a window gives NaN.

    The native kernel reads every input once and saves one byte for each number of the result.
    Under torch.func and torch.compile, and in other dtypes than float32 and float64, it is the
    plain operations.

    Args:
        a: (B, C, H, W).
        b, c: as a, or None.

    Returns:
        y (B, C, ceil(H / 2), ceil(W / 2)).

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; the message says.

    Example:
        >>> import torch
        >>> from mann_ext.ops import relu_pool
        >>> relu_pool(torch.randn(2, 3, 7, 7), torch.randn(2, 3, 7, 7)).shape
        torch.Size([2, 3, 4, 4])
    """
    _check(a, b, c)
    native = _library.use_native(a.device, "relu_pool")
    plain = needs_loop() or torch.compiler.is_compiling()
    if plain or not native or a.dtype not in (torch.float32, torch.float64):
        return reference.relu_pool(a, b, c)
    parts = [None if part is None else part.contiguous() for part in (a, b, c)]
    made: Tensor = _common.apply_directly(_ReluPool, *parts)[0]
    return made


def _check(a: Tensor, b: Tensor | None, c: Tensor | None) -> None:
    op = "relu_pool"
    if a is None:
        raise TypeError(f"{op}: expected a to be a torch.Tensor, got None")
    _common.check_tensors(op, a=a, b=b, c=c)
    _common.check_shape(op, "a", a, ("B", "C", "H", "W"))
    _common.check_floating(op, a=a)
    if min(a.shape[2:]) < 1:
        raise ValueError(f"{op}: expected a of at least one row and column, got {tuple(a.shape)}")
    if b is None and c is not None:
        raise ValueError(f"{op}: expected b where c is given, got None")
    for name, part in (("b", b), ("c", c)):
        if part is None:
            continue
        _common.check_shape(op, name, part, tuple(a.shape), a=a)
        if part.dtype != a.dtype:
            raise TypeError(
                f"{op}: expected {name} of dtype {a.dtype} as a is, got {part.dtype}; convert it "
                f"with .to({a.dtype})"
            )
    _common.check_same_device(op, a, b=b, c=c)


class _ReluPool(torch.autograd.Function):
    @staticmethod
    def forward(a: Any, b: Any, c: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.mann_ext.relu_pool(a, b, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.sizes = inputs[0].shape[2:]
        ctx.parts = sum(x is not None for x in inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (where,) = ctx.saved_tensors
        made = _common.apply_directly(_Backward, grad.contiguous(), where, *ctx.sizes, ctx.parts)
        return (*made[: ctx.parts], *[None] * (3 - ctx.parts))


class _Backward(torch.autograd.Function):
    """Linear in grad: its own derivative gathers what it spread."""

    @staticmethod
    def forward(grad: Any, where: Any, height: int, width: int, parts: int) -> tuple[Tensor, ...]:
        return torch.ops.mann_ext.relu_pool_backward(grad, where, height, width, parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, where, ctx.height, ctx.width, ctx.parts = inputs
        ctx.save_for_backward(where)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (where,) = ctx.saved_tensors
        code = where.long()
        rows = torch.arange(where.shape[2], device=where.device).unsqueeze(-1)
        columns = torch.arange(where.shape[3], device=where.device)
        at = (2 * rows + (code >> 1 & 1)) * ctx.width + 2 * columns + (code & 1)
        total = sum(
            grads[k].flatten(2).gather(2, at.flatten(2)).view_as(at) * (code >> (2 + k) & 1)
            for k in range(ctx.parts)
        )
        return total, None, None, None, None


def _fake(a: Tensor, b: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*a.shape[:2], (a.shape[2] + 1) // 2, (a.shape[3] + 1) // 2)
    return a.new_empty(shape), a.new_empty(shape, dtype=torch.uint8)


def _backward_fake(
    grad: Tensor, where: Tensor, height: int, width: int, parts: int
) -> tuple[Tensor, ...]:
    shape = (*grad.shape[:2], height, width)
    return tuple(grad.new_empty(shape if k < parts else (0,)) for k in range(3))


if _library.native_available() and hasattr(torch.ops.mann_ext, "relu_pool"):
    torch.library.register_fake("mann_ext::relu_pool")(_fake)
    torch.library.register_fake("mann_ext::relu_pool_backward")(_backward_fake)
