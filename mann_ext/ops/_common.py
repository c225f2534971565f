"""What all operators share: argument checks, autocast, folding vmap's dimension into the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

MEMORY_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"


def check_shape(
    op: str, name: str, tensor: Tensor, shape: Sequence[int | str], hint: str = ""
) -> None:
    """Sizes that are names in ``shape`` may be anything."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == size
        for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{op}: expected {name} of shape {describe(shape)}, got {describe(tensor.shape)}"
            + (f"; {hint}" if hint else "")
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
            raise NotImplementedError(
                f"{op}: the native operator has no forward-mode derivative; use reverse mode "
                "(torch.func.grad, vjp, jacrev) or run under mann_ext.backend('reference')"
            )


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
