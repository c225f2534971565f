"""The memory of the Neural Turing Machine over a whole sequence (``ntm_scan``)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mann_ext import _library, reference
from mann_ext.ops import _common
from mann_ext.ops.lrua import HISTORY_BUDGET

__all__ = ["NTMScanOutput", "ntm_scan"]

_TILE = 64  # slots a tile of the native layout; rows of weights are padded to a multiple
_MAX_HEADS = 64


class NTMScanOutput(NamedTuple):
    """Reads (T, B, R, W), and memory (B, N, W) and weights (B, H, N) after the last step."""

    reads: Tensor
    memory: Tensor
    weights: Tensor


def ntm_scan(
    memory: Tensor,
    weights: Tensor,
    keys: Tensor,
    strengths: Tensor,
    gates: Tensor,
    shifts: Tensor,
    sharpenings: Tensor,
    erases: Tensor,
    adds: Tensor,
    reset: Tensor | None = None,
    *,
    eps: float = 1e-8,
    initial_value: float = 1e-6,
    history_budget: int | None = None,
    snapshot_every: int | None = None,
) -> NTMScanOutput:
    """T steps of the memory of Graves et al. (2014), eqs. 2-9, for several heads.

    Each head makes its weights from those it had at the step before::

        w_c   = softmax_i(beta k . m_i / (|k| |m_i| + eps))
        w_g   = g w_c + (1 - g) w_{t-1}
        w~(i) = s(-1) w_g(i + 1) + s(0) w_g(i) + s(1) w_g(i - 1)      circular
        w     = w~^gamma / sum w~^gamma

    A step writes, then reads what it wrote: the write heads address M_{t-1}, then all erase, then
    all add, M_t = M_{t-1} prod_h (1 - w_h e_h^T) + sum_h w_h a_h^T; the read heads address M_t and
    read r_h = w_h M_t. The paper leaves the order of reading and writing open. This one is that of
    :func:`lrua_scan`: what a step is given can be read at the same step.

    Gradients flow through everything, to the first memory and weights too. A zero row or key has
    cosine 0 and a finite gradient. NaN in an input gives NaN in what depends on it.

    Args:
        memory: (B, N, W), float32 or float64, any strides (an expanded constant costs nothing). All
            other tensors are cast to its dtype.
        weights: (B, H, N), at least 0, of the step before: the R read heads, then the write heads.
        keys: (T, B, H, W), the heads in the same order.
        strengths: (T, B, H), beta > 0.
        gates: (T, B, H), g in (0, 1).
        shifts: (T, B, H, 3), at least 0 with sum 1: how much moves by -1, 0 and +1 slots.
        sharpenings: (T, B, H), gamma >= 1.
        erases: (T, B, H - R, W), in (0, 1).
        adds: (T, B, H - R, W).
        reset: (T, B) bool: where True the state is replaced before step t by memory
            ``initial_value`` and weights one-hot at slot 0.
        eps: added to the cosine's denominator; greater than 0.
        initial_value: what ``reset`` fills the memory with.
        history_budget: bytes up to which every M_t is saved for the backward pass, T B N W numbers
            (N rounded up to a multiple of 64). Above it only every K-th is, K = ceil(sqrt(T)), and
            the backward pass makes the K - 1 between two of them again, one batch element a thread
            at a time. The weights, T B H N numbers, are always saved. Default: ``HISTORY_BUDGET``.
        snapshot_every: K, whatever the budget; 1 saves every M_t.

    Returns:
        reads (T, B, R, W), and memory and weights after the last step.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option does not fit; the message says.
        NotImplementedError: forward-mode differentiation of the native operator.

    Example:
        >>> import torch
        >>> from mann_ext.ops import ntm_scan
        >>> memory, weights = torch.randn(3, 20, 8), torch.randn(3, 2, 20).softmax(-1)
        >>> keys, adds = torch.randn(5, 3, 2, 8), torch.randn(5, 3, 1, 8)
        >>> ones, shifts = torch.ones(5, 3, 2), torch.randn(5, 3, 2, 3).softmax(-1)
        >>> output = ntm_scan(
        ...     memory, weights, keys, 5 * ones, ones / 2, shifts, 2 * ones, adds.sigmoid(), adds
        ... )
        >>> output.reads.shape, output.weights.shape
        (torch.Size([5, 3, 1, 8]), torch.Size([3, 2, 20]))
    """
    given = (weights, keys, strengths, gates, shifts, sharpenings, erases, adds)
    _check(memory, *given, reset, eps, snapshot_every)
    inputs: list[Any] = [memory, *(x.to(memory.dtype) for x in given)]
    if not _library.use_native(memory.device, "ntm_scan"):
        with _common.without_autocast(memory.device):
            scan = partial(reference.ntm_scan, reset=reset, eps=eps, initial_value=initial_value)
            output = scan(*inputs)
        return NTMScanOutput(*output)

    _common.check_no_forward_mode("ntm_scan", *inputs)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if snapshot_every is None:
        snapshot_every = _choose_snapshots(memory, keys.shape[0], history_budget)
    output = _common.apply(
        "ntm_scan", _Scan, memory, *(x.contiguous() for x in inputs[1:]), _contiguous(reset),
        float(eps), float(initial_value), int(snapshot_every), save,
    )  # fmt: skip
    return NTMScanOutput(*output[:3])


def _choose_snapshots(memory: Tensor, steps: int, budget: int | None) -> int:
    batch, slots, width = memory.shape
    every_one = steps * batch * _padded(slots) * width * memory.element_size()
    if every_one <= (HISTORY_BUDGET if budget is None else budget):
        return 1
    return math.ceil(math.sqrt(steps))


def _padded(slots: int) -> int:
    return (slots + _TILE - 1) // _TILE * _TILE


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check(
    memory: Tensor, weights: Tensor, keys: Tensor, strengths: Tensor, gates: Tensor,
    shifts: Tensor, sharpenings: Tensor, erases: Tensor, adds: Tensor, reset: Tensor | None,
    eps: float, snapshot_every: int | None,
) -> None:  # fmt: skip
    op = "ntm_scan"
    others = {
        "weights": weights, "keys": keys, "strengths": strengths, "gates": gates,
        "shifts": shifts, "sharpenings": sharpenings, "erases": erases, "adds": adds,
    }  # fmt: skip
    for name, tensor in {"memory": memory, **others}.items():
        if tensor is None:
            raise TypeError(f"{op}: expected {name} to be a torch.Tensor, got None")
    _common.check_tensors(op, memory=memory, **others, reset=reset)
    if memory.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: expected memory of dtype float32 or float64, got {memory.dtype}; convert it "
            "with .float()"
        )
    _common.check_shape(op, "memory", memory, ("B", "N", "W"))
    batch, slots, width = memory.shape
    _common.check_shape(op, "keys", keys, ("T", batch, "H", width), memory=memory)
    steps, _, heads, _ = keys.shape
    _common.check_shape(op, "erases", erases, (steps, batch, "H - R", width), keys=keys)
    writes = erases.shape[2]
    if min(slots, width, writes, heads - writes) < 1:
        raise ValueError(
            f"{op}: expected at least one slot, column, read head and write head, got {slots} "
            f"slots, width {width}, and of {heads} heads in keys {writes} in erases, which write"
        )
    if heads > _MAX_HEADS:
        raise ValueError(f"{op}: expected at most {_MAX_HEADS} heads, got {heads}")
    _common.check_shape(op, "adds", adds, (steps, batch, writes, width), erases=erases)
    _common.check_shape(op, "weights", weights, (batch, heads, slots), memory=memory, keys=keys)
    for name in ("strengths", "gates", "sharpenings"):
        _common.check_shape(op, name, others[name], (steps, batch, heads), keys=keys)
    _common.check_shape(op, "shifts", shifts, (steps, batch, heads, 3), keys=keys)
    if reset is not None:
        _common.check_shape(op, "reset", reset, (steps, batch), keys=keys)
        if reset.dtype != torch.bool:
            raise TypeError(
                f"{op}: expected reset of dtype bool, got {reset.dtype}; use reset.bool()"
            )
    _common.check_floating(op, **others)
    _common.check_same_device(op, memory, **others, reset=reset)
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: expected a finite eps > 0, got {eps}; a zero row has no direction")
    if snapshot_every is not None and snapshot_every < 1:
        raise ValueError(
            f"{op}: expected snapshot_every of 1 or more, got {snapshot_every}; 1 saves all"
        )


# Where the batch is in each tensor: (memory, weights, keys, strengths, gates, shifts, sharpenings,
# erases, adds, reset) and (reads, memory, weights, weight history, snapshots).
_SCAN_AXES = (0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
_SCAN_OUTPUT_AXES = (1, 0, 0, 1, 1)
_BACKWARD_AXES = (1, 0, 0, *_SCAN_AXES, 1, 1)
_BACKWARD_OUTPUT_AXES = _SCAN_AXES[:9]


def _vmap(
    function: type[torch.autograd.Function], axes: tuple[int, ...], output_axes: tuple[int, ...],
    memory: int, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...],
) -> tuple[Any, Any]:  # fmt: skip
    """``function`` with vmap's dimension in the batch; all tensors but the memory contiguous."""
    size, count = info.batch_size, len(axes)
    folded = [
        _common.fold(x, dim, axis, size)
        for x, dim, axis in zip(args[:count], in_dims[:count], axes, strict=True)
    ]
    output = function.apply(
        *[x if i == memory else _contiguous(x) for i, x in enumerate(folded)], *args[count:]
    )
    pairs = [_common.unfold(x, axis, size) for x, axis in zip(output, output_axes, strict=True)]
    return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)


class _Scan(torch.autograd.Function):
    """The raw operator; its outputs after the first three are not differentiable."""

    @staticmethod
    def forward(
        memory: Any, weights: Any, keys: Any, strengths: Any, gates: Any, shifts: Any,
        sharpenings: Any, erases: Any, adds: Any, reset: Any, eps: float, initial_value: float,
        snapshot_every: int, save_for_backward: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.ntm_scan(
            memory, weights, keys, strengths, gates, shifts, sharpenings, erases, adds, reset, eps,
            initial_value, snapshot_every, save_for_backward,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[10:13]
        history = output[3:]
        ctx.mark_non_differentiable(*history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10], *history)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need_memory_grad = ctx.needs_input_grad[0]
        grad_memory, *others = _ScanBackward.apply(
            *map(_contiguous, grads[:3]), *ctx.saved_tensors, *ctx.options, need_memory_grad
        )
        return grad_memory if need_memory_grad else None, *others, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_Scan, _SCAN_AXES, _SCAN_OUTPUT_AXES, 0, info, in_dims, args)


class _ScanBackward(torch.autograd.Function):
    """The hand-written backward pass; its own derivative recomputes through the reference."""

    @staticmethod
    def forward(
        grad_reads: Any, grad_memory: Any, grad_weights: Any, memory: Any, weights: Any, keys: Any,
        strengths: Any, gates: Any, shifts: Any, sharpenings: Any, erases: Any, adds: Any,
        reset: Any, weight_history: Any, snapshots: Any, eps: float, initial_value: float,
        snapshot_every: int, need_memory_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.ntm_scan_backward(
            grad_reads, grad_memory, grad_weights, memory, weights, keys, strengths, gates, shifts,
            sharpenings, erases, adds, reset, weight_history, snapshots, eps, initial_value,
            snapshot_every, need_memory_grad,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:13])
        ctx.options = {"eps": inputs[15], "initial_value": inputs[16]}
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, reset = ctx.saved_tensors
        present = [i for i, x in enumerate(inputs) if x is not None]

        scan = partial(reference.ntm_scan, reset=reset, **ctx.options)

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            full = dict(zip(present, values, strict=True))
            outputs, pullback = torch.func.vjp(scan, *(full[i] for i in range(3, 12)))[:2]
            return pullback(
                tuple(full.get(i, torch.zeros_like(out)) for i, out in enumerate(outputs))
            )

        results, pullback = torch.func.vjp(first_order, *(inputs[i] for i in present))[:2]
        found = pullback(
            tuple(
                torch.zeros_like(result) if grad is None or grad.shape != result.shape else grad
                for grad, result in zip(grads, results, strict=True)
            )
        )
        out: list[Tensor | None] = [None] * 19
        for i, grad in zip(present, found, strict=True):
            out[i] = grad
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_ScanBackward, _BACKWARD_AXES, _BACKWARD_OUTPUT_AXES, 3, info, in_dims, args)


def _scan_fake(
    memory: Tensor, weights: Tensor, keys: Tensor, strengths: Tensor, gates: Tensor,
    shifts: Tensor, sharpenings: Tensor, erases: Tensor, adds: Tensor, reset: Tensor | None,
    eps: float, initial_value: float, snapshot_every: int, save_for_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    steps, batch, heads, width = keys.shape
    reads, padded = heads - erases.shape[2], _padded(memory.shape[1])
    saved = steps if save_for_backward else 0
    return (
        keys.new_empty(steps, batch, reads, width),
        memory.new_empty(memory.shape),
        torch.empty_like(weights),
        keys.new_empty(saved, batch, heads, padded),
        keys.new_empty(saved // snapshot_every, batch, padded * width),
    )


def _scan_backward_fake(
    grad_reads: Tensor | None, grad_memory: Tensor | None, grad_weights: Tensor | None,
    memory: Tensor, weights: Tensor, keys: Tensor, strengths: Tensor, gates: Tensor,
    shifts: Tensor, sharpenings: Tensor, erases: Tensor, adds: Tensor, reset: Tensor | None,
    weight_history: Tensor, snapshots: Tensor, eps: float, initial_value: float,
    snapshot_every: int, need_memory_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    others = (weights, keys, strengths, gates, shifts, sharpenings, erases, adds)
    return (
        memory.new_empty(memory.shape if need_memory_grad else (0,)),
        *map(torch.empty_like, others),
    )


if _library.native_available():
    torch.library.register_fake("mann_ext::ntm_scan")(_scan_fake)
    torch.library.register_fake("mann_ext::ntm_scan_backward")(_scan_backward_fake)
