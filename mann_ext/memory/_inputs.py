"""What modules check of their inputs before anything runs, in one place and one wording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_sizes(module: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{module}: expected {name} to be a whole number of at least 1, got {size!r}"
            )


def check_input(
    module: str, x: Any, weight: Tensor, size: int, layouts: str, ranks: Sequence[int] = (3,)
) -> None:
    """``layouts`` says in words what shapes fit; ``size`` is the last one's."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{module}: expected x to be a tensor, got {type(x).__name__}")
    if x.dim() not in ranks or x.shape[-1] != size:
        raise ValueError(f"{module}: expected x of shape {layouts}, got {tuple(x.shape)}")
    _check_device(module, "x", x, weight)
    fits = x.dtype == weight.dtype or (
        x.dtype.is_floating_point and torch.is_autocast_enabled(x.device.type)
    )
    if not fits:
        raise TypeError(
            f"{module}: expected x of dtype {weight.dtype} as the parameters are, got {x.dtype}; "
            f"convert it with .to({weight.dtype})"
        )


def check_traceable(module: str, x: Tensor) -> None:
    if x.shape[0] == 0:
        raise ValueError(
            f"{module}: return_trace needs at least one step, got x with none; leave it out for "
            "an empty sequence"
        )


def check_reset_mask(module: str, reset_mask: Tensor | None, x: Tensor) -> None:
    if reset_mask is None:
        return
    shape = tuple(x.shape[:-1])
    if tuple(reset_mask.shape) != shape:
        raise ValueError(
            f"{module}: expected reset_mask of shape {shape} as x has, got "
            f"{tuple(reset_mask.shape)}"
        )
    if reset_mask.dtype != torch.bool:
        raise TypeError(
            f"{module}: expected reset_mask of dtype bool, got {reset_mask.dtype}; use .bool()"
        )
    _check_device(module, "reset_mask", reset_mask, x)


def check_state(
    module: str, state: Any, shapes: dict[str, tuple[int, ...]], x: Tensor, batched: bool = True
) -> None:
    """``shapes``: of the state's parts, batch first; without it for an unbatched call."""
    parts = tuple(state) if isinstance(state, tuple) else ()
    if len(parts) != len(shapes) or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"{module}: expected state to be a tuple of tensors ({', '.join(shapes)}), got "
            f"{type(state).__name__}; pass what initial_state or the last call returned"
        )
    for (name, whole), part in zip(shapes.items(), parts, strict=True):
        shape = whole if batched else whole[1:]
        if tuple(part.shape) != shape:
            if part.dim() != len(shape):
                hint = "the state is batched where x is, and only there"
            elif batched and tuple(part.shape[1:]) == shape[1:]:
                hint = f"batch size changed? use initial_state({shape[0]})"
            else:
                hint = "the state of a module of other sizes?"
            raise ValueError(
                f"{module}: expected state.{name} of shape {shape}, got {tuple(part.shape)}; {hint}"
            )
        if not part.dtype.is_floating_point:
            raise TypeError(
                f"{module}: expected state.{name} of a floating-point dtype, got {part.dtype}"
            )
        _check_device(module, f"state.{name}", part, x)


def _check_device(module: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{module}: expected {name} on {like.device}, got {tensor.device}; move it with "
            f".to({str(like.device)!r})"
        )
