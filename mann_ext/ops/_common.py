"""What all operators share: argument checks, autocast, folding vmap's dimension into the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MEMORY_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"


def check_shape(
    op: str, name: str, tensor: Tensor, shape: Sequence[int | str], **because: Tensor | str
) -> None:
    """Sizes that are names in ``shape`` may be anything; ``because``: what the others come from."""
    # Nothing is formatted unless it fails: that would fix a size that torch.compile left open.
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    if fits:
        for want, size in zip(shape, sizes, strict=True):
            if want != size and not isinstance(want, str):
                fits = False
    if not fits:
        reasons = [
            x if isinstance(x, str) else f"{other} has shape {describe(x.shape)}"
            for other, x in because.items()
        ]
        raise ValueError(
            f"{op}: expected {name} of shape {describe(shape)}, got {describe(tensor.shape)}"
            + "".join(f"; {reason}" for reason in reasons)
        )


def check_tensors(op: str, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{op}: expected {name} to be a torch.Tensor, got {type(tensor).__name__}; "
                "convert it with torch.as_tensor"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{op}: expected {name} to be dense, got layout {tensor.layout}; "
                "convert it with .to_dense()"
            )


def check_same_device(op: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{op}: expected {name} on {reference.device} as the memory is, got "
                f"{tensor.device}; move it with .to({str(reference.device)!r})"
            )


def check_floating(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(
                f"{op}: expected {name} of a floating-point dtype, got {tensor.dtype}; "
                "convert it with .float()"
            )


def check_memory_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in MEMORY_DTYPES:
        raise TypeError(
            f"{op}: expected {name} of dtype float32, float64, bfloat16 or float16, got "
            f"{tensor.dtype}; convert it with .float()"
        )


def check_no_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Say what to use instead of forward mode, which would fail deep inside PyTorch."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if (
            tensor is not None
            and tensor.dtype.is_floating_point
            and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
        ):
            raise no_forward_mode(op)


def no_forward_mode(op: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op}: the native operator has no forward-mode derivative; use reverse mode "
        "(torch.func.grad, vjp, jacrev; jacrev of jacrev for a Hessian) or run under "
        "mann_ext.backend('reference')"
    )


def apply(op: str, function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``; a tangent hidden under other transforms (jacfwd of jacrev) shows here.

    A ``jvp`` of the functions' own would say it as well, but torch.compile refuses those that have
    one.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    try:
        return apply_directly(function, *args)
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        raise no_forward_mode(op) from error


def apply_directly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` with every argument given by position.

    ``apply`` inspects the signature for defaults at every call, more than half of what a call costs
    in Python; where no transform of torch.func is at work, what it then calls is called at once.
    And where nothing is recorded (inference, and a backward pass without ``create_graph``) that is
    the operator itself.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The reference must not be cast down: its sums are in the accumulation dtype by definition."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def fold(tensor: Tensor | None, mapped: int | None, axis: int, size: int) -> Tensor | None:
    """Merge vmap's dimension ``mapped`` (None: not mapped, repeat) into the batch axis ``axis``."""
    if tensor is None or tensor.dim() <= axis:  # None, or an empty placeholder
        return tensor
    if mapped is None:
        tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        tensor = tensor.movedim(mapped, axis)
    return tensor.flatten(axis, axis + 1)


def unfold(tensor: Tensor, axis: int, size: int) -> tuple[Tensor, int | None]:
    """Undo :func:`fold` on an output; placeholders stay unmapped."""
    if tensor.dim() <= axis:
        return tensor, None
    return tensor.unflatten(axis, (size, tensor.shape[axis] // size)), axis
