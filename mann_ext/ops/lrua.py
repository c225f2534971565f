"""The LRUA memory: a whole sequence (``lrua_scan``) or one step (``lrua_step``)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mann_ext import _library, reference
from mann_ext.ops import _common

__all__ = ["HISTORY_BUDGET", "LRUAScanOutput", "LeastUsed", "lrua_scan", "lrua_step"]

LeastUsed = Literal["per_head", "shared"]

HISTORY_BUDGET = 4 * 2**20
"""Bytes up to which every M_t of a scan is saved for the backward pass; above, it rolls back
(``lrua_scan``) or makes what lies between snapshots again (``ntm_scan``).

More than a cache holds is slower to save and load than to undo."""

_TILE = 64  # slots a tile of the native layout; rows of weights are padded to a multiple
MAX_HEADS = 64
_MAX_CHUNK = 32


class LRUAScanOutput(NamedTuple):
    """Reads (T, B, R, W) or, of one step, (B, R, W), and the state after the last step."""

    reads: Tensor
    memory: Tensor
    read_weights: Tensor
    usage: Tensor


def lrua_scan(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    gates: Tensor,
    strengths: Tensor | None = None,
    contents: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    usage_decay: float = 0.99,
    least_used: LeastUsed = "per_head",
    eps: float = 1e-8,
    initial_value: float = 1e-6,
    history_budget: int | None = None,
    snapshot_every: int | None = None,
    chunk: int | None = None,
) -> LRUAScanOutput:
    """T steps of the LRUA memory of Santoro et al. (2016), eqs. 2-8 and 17-23.

    Each step, for every head r::

        w_w,r = g_r w_r,{t-1} + (1 - g_r) lu_r        lu: the n = min(R, N) least-used slots
        M_t   = erase(M_{t-1}) + sum_r w_w,r a_r^T    the n slots are set to zero before the write
        w_r   = softmax_i(beta_r k_r . m_i / (|k_r| |m_i| + eps))
        r_r   = sum_i w_r,i m_i
        u_t   = usage_decay u_{t-1} + sum_r (w_r + w_w,r)

    Of equal usages the lowest index counts as less used; NaN counts as most used. No gradient flows
    through the usage or the choice of slots. A zero row or key has cosine 0 and a finite gradient.
    NaN in an input gives NaN in what depends on it.

    Args:
        memory: (B, N, W), float32, float64, bfloat16 or float16, any strides (an expanded constant
            costs nothing). It is rounded to its dtype after every step. All other tensors are cast
            to the accumulation dtype: float64 for float64 memory, else float32.
        read_weights: (B, R, N), of the previous step.
        usage: (B, N).
        keys: (T, B, R, W).
        gates: (T, B, R), in (0, 1).
        strengths: (T, B, R), the beta of the softmax; None: 1.
        contents: (T, B, R, W), what is written; None: the keys, as in the paper.
        reset: (T, B) bool: where True the state is replaced before step t by memory
            ``initial_value`` and read weights and usage one-hot at slot 0.
        usage_decay: gamma.
        least_used: "per_head": head r writes to the r-th least-used slot; "shared": every head
            writes to all n of them (the paper's eqs. 6-7 to the letter).
        eps: added to the cosine's denominator; greater than 0.
        initial_value: what ``reset`` fills the memory with.
        history_budget: bytes up to which every M_t is saved for the backward pass. Else it undoes
            the writes instead, with room for one M; ``python -m benchmarks drift`` measures how
            exact that is. Default: ``HISTORY_BUDGET``.
        snapshot_every: overrides the budget: 1 saves every M_t, 0 none (pure rollback), K every
            K-th.
        chunk: steps, at most 32, whose writes are deferred and made up for in one pass over a
            memory that does not fit in cache: the same numbers to rounding from up to 4 times fewer
            bytes. 1: none; None: 1.25 sqrt(W / R) where that pays (large memories with
            W >= 20 R and R <= 2). Never deferred: 16-bit memories, memories with snapshots,
            memories that fit on chip on a GPU, fewer than 4 columns, and the backward pass.

    Returns:
        reads (T, B, R, W), and memory, read_weights and usage after the last step.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option does not fit; the message says.
        NotImplementedError: forward-mode differentiation of the native operator.
    """
    _check(
        "lrua_scan", memory, read_weights, usage, keys, gates, strengths, contents, reset,
        usage_decay, least_used, eps, snapshot_every, chunk,
    )  # fmt: skip
    return _run(
        "lrua_scan", memory, read_weights, usage, keys, gates, strengths, contents, reset,
        usage_decay, least_used, eps, initial_value, history_budget, snapshot_every, chunk,
    )  # fmt: skip


def _run(
    op: str, memory: Tensor, read_weights: Tensor, usage: Tensor, keys: Tensor, gates: Tensor,
    strengths: Tensor | None, contents: Tensor | None, reset: Tensor | None, usage_decay: float,
    least_used: LeastUsed, eps: float, initial_value: float, history_budget: int | None,
    snapshot_every: int | None, chunk: int | None,
) -> LRUAScanOutput:  # fmt: skip
    acc = reference.accumulation_dtype(memory.dtype)
    read_weights, usage, keys, gates = (x.to(acc) for x in (read_weights, usage, keys, gates))
    strengths = None if strengths is None else strengths.to(acc)
    contents = None if contents is None else contents.to(acc)

    if not _library.use_native(memory.device, "lrua_scan"):
        with _common.without_autocast(memory.device):
            output = reference.lrua_scan(
                memory, read_weights, usage, keys, gates, strengths, contents, reset,
                usage_decay=usage_decay, least_used=least_used, eps=eps,
                initial_value=initial_value,
            )  # fmt: skip
        return LRUAScanOutput(*output[:4])

    differentiable = (memory, read_weights, keys, gates, strengths, contents)
    _common.check_no_forward_mode(op, *differentiable)
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in differentiable
    )
    if snapshot_every is None:
        budget = HISTORY_BUDGET if history_budget is None else history_budget
        numbers = keys.shape[0] * memory.shape[0] * padded(memory.shape[1]) * memory.shape[2]
        snapshot_every = 1 if numbers * memory.element_size() <= budget else 0
    output = _common.apply(
        op, _Scan, memory, read_weights.contiguous(), usage.contiguous(), keys.contiguous(),
        gates.contiguous(), _contiguous(strengths), _contiguous(contents), _contiguous(reset),
        float(usage_decay), least_used == "shared", float(eps), float(initial_value),
        int(snapshot_every), 0 if chunk is None else int(chunk), save,
    )  # fmt: skip
    return LRUAScanOutput(*output[:4])


def lrua_step(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    gates: Tensor,
    strengths: Tensor | None = None,
    contents: Tensor | None = None,
    *,
    usage_decay: float = 0.99,
    least_used: LeastUsed = "per_head",
    eps: float = 1e-8,
) -> LRUAScanOutput:
    """One step of the LRUA memory: :func:`lrua_scan` with T = 1 and no time axis.

    For controllers that read r_{t-1}, streaming inference and reinforcement learning.

    Args:
        memory, read_weights, usage: the state, as for :func:`lrua_scan`.
        keys: (B, R, W).
        gates: (B, R).
        strengths: (B, R) or None.
        contents: (B, R, W) or None.
        usage_decay, least_used, eps: as for :func:`lrua_scan`.

    Returns:
        reads (B, R, W) and the new memory, read_weights and usage.

    Raises:
        ValueError, TypeError, NotImplementedError: as for :func:`lrua_scan`.
    """
    _check(
        "lrua_step", memory, read_weights, usage, keys, gates, strengths, contents, None,
        usage_decay, least_used, eps, None, None,
    )  # fmt: skip
    output = _run(
        "lrua_step", memory, read_weights, usage, keys.unsqueeze(0), gates.unsqueeze(0),
        None if strengths is None else strengths.unsqueeze(0),
        None if contents is None else contents.unsqueeze(0), None,
        usage_decay, least_used, eps, 0.0, None, None, None,
    )  # fmt: skip
    return output._replace(reads=output.reads.squeeze(0))


def padded(slots: int) -> int:
    return (slots + _TILE - 1) // _TILE * _TILE


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check(
    op: str,
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    gates: Tensor,
    strengths: Tensor | None,
    contents: Tensor | None,
    reset: Tensor | None,
    usage_decay: float,
    least_used: str,
    eps: float,
    snapshot_every: int | None,
    chunk: int | None,
) -> None:
    required = {
        "memory": memory, "read_weights": read_weights, "usage": usage, "keys": keys,
        "gates": gates,
    }  # fmt: skip
    for name, tensor in required.items():
        if tensor is None:
            raise TypeError(f"{op}: expected {name} to be a torch.Tensor, got None")
    _common.check_tensors(op, **required, strengths=strengths, contents=contents, reset=reset)
    _common.check_memory_dtype(op, "memory", memory)
    _common.check_shape(op, "memory", memory, ("B", "N", "W"))
    batch, slots, width = memory.shape
    if op == "lrua_scan":
        time: tuple[str, ...] = ("T",)
        other = "for one step, (B, R, W), use lrua_step"
    else:
        time = ()
        other = "for a sequence, (T, B, R, W), use lrua_scan"
    shape: tuple[int | str, ...] = (*time, batch, "R", width)
    if keys.dim() == len(shape):
        _common.check_shape(op, "keys", keys, shape, memory=memory)
    else:
        _common.check_shape(op, "keys", keys, shape, fix=other)
    heads = keys.shape[-2]
    if min(slots, width, heads) < 1:
        raise ValueError(
            f"{op}: expected at least one slot, head and column, got {slots} slots, {heads} heads "
            f"and width {width}"
        )
    if heads > MAX_HEADS:
        raise ValueError(f"{op}: expected at most {MAX_HEADS} heads, got {heads}")
    *lead, _, _ = keys.shape  # T and B, or B
    _common.check_shape(op, "read_weights", read_weights, (batch, heads, slots), keys=keys)
    _common.check_shape(op, "usage", usage, (batch, slots), memory=memory)
    _common.check_shape(op, "gates", gates, (*lead, heads), keys=keys)
    if strengths is not None:
        _common.check_shape(op, "strengths", strengths, (*lead, heads), keys=keys)
    if contents is not None:
        _common.check_shape(op, "contents", contents, (*lead, heads, width), keys=keys)
    if reset is not None:
        _common.check_shape(op, "reset", reset, lead, keys=keys)
        if reset.dtype != torch.bool:
            raise TypeError(
                f"{op}: expected reset of dtype bool, got {reset.dtype}; use reset.bool()"
            )
    _common.check_floating(
        op, read_weights=read_weights, usage=usage, keys=keys, gates=gates,
        strengths=strengths, contents=contents,
    )  # fmt: skip
    _common.check_same_device(
        op, memory, read_weights=read_weights, usage=usage, keys=keys, gates=gates,
        strengths=strengths, contents=contents, reset=reset,
    )  # fmt: skip
    check_options(op, usage_decay, least_used, eps, snapshot_every)
    if chunk is not None and not 1 <= chunk <= _MAX_CHUNK:
        raise ValueError(
            f"{op}: expected chunk from 1 to {_MAX_CHUNK}, got {chunk}; None chooses by size"
        )


def check_options(
    op: str, usage_decay: float, least_used: str, eps: float, snapshot_every: int | None
) -> None:
    if least_used not in ("per_head", "shared"):
        raise ValueError(f"{op}: expected least_used 'per_head' or 'shared', got {least_used!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: expected a finite eps > 0, got {eps}; a zero row has no direction")
    if snapshot_every is not None and snapshot_every < 0:
        raise ValueError(
            f"{op}: expected snapshot_every of 0 or more, got {snapshot_every}; 0 rolls back"
        )
    if not 0 <= usage_decay <= 1:
        raise ValueError(f"{op}: expected usage_decay in [0, 1], got {usage_decay}")


class _Scan(torch.autograd.Function):
    """The raw operator; its outputs after the first three are not differentiable."""

    # torch.compile takes a variadic forward for the old style with a leading ctx: name everything.
    @staticmethod
    def forward(
        memory: Any, read_weights: Any, usage: Any, keys: Any, gates: Any, strengths: Any,
        contents: Any, reset: Any, usage_decay: float, shared: bool, eps: float,
        initial_value: float, snapshot_every: int, chunk: int, save_for_backward: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.lrua_scan(
            memory, read_weights, usage, keys, gates, strengths, contents, reset, usage_decay,
            shared, eps, initial_value, snapshot_every, chunk, save_for_backward,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        memory, read_weights, _, keys, gates, strengths, contents, reset = inputs[:8]
        _, ctx.shared, ctx.eps, ctx.initial_value, ctx.snapshot_every, _, _ = inputs[8:]
        reads, memory_out, _, usage_out, *history = output
        ctx.mark_non_differentiable(usage_out, *history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            memory, read_weights, keys, gates, strengths, contents, reset,
            reads, memory_out, *history,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        strengths, contents, _, reads = saved[4:8]
        grad_reads, grad_memory, grad_read_weights = grads[:3]
        if grad_reads is None:
            grad_reads = torch.zeros_like(reads)
        out = _common.apply_directly(
            _ScanBackward, grad_reads.contiguous(), _contiguous(grad_memory),
            _contiguous(grad_read_weights), *saved, ctx.shared, ctx.eps, ctx.initial_value,
            ctx.snapshot_every, ctx.needs_input_grad[0],
        )  # fmt: skip
        return (
            out[0] if ctx.needs_input_grad[0] else None, out[1], None, out[2], out[3],
            None if strengths is None else out[4], None if contents is None else out[5],
            *[None] * 8,
        )  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [
            _common.fold(x, dim, axis, size)
            for x, dim, axis in zip(args[:8], in_dims[:8], _SCAN_AXES, strict=True)
        ]
        output = _Scan.apply(
            *[x if i == 0 else _contiguous(x) for i, x in enumerate(folded)], *args[8:]
        )
        pairs = [
            _common.unfold(x, axis, size) for x, axis in zip(output, _SCAN_OUTPUT_AXES, strict=True)
        ]
        return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)


# Where the batch is in each tensor: (memory, read_weights, usage, keys, gates, strengths, contents,
# reset) and (reads, memory, read_weights, usage, weights, slots, erased rows, snapshots).
_SCAN_AXES = (0, 0, 0, 1, 1, 1, 1, 1)
_SCAN_OUTPUT_AXES = (1, 0, 0, 0, 1, 1, 1, 1)
_BACKWARD_AXES = (1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1)
_BACKWARD_OUTPUT_AXES = (0, 0, 1, 1, 1, 1)


class _ScanBackward(torch.autograd.Function):
    """The hand-written backward pass; its own derivative recomputes through the reference."""

    @staticmethod
    def forward(
        grad_reads: Any, grad_memory: Any, grad_read_weights: Any, memory: Any,
        read_weights: Any, keys: Any, gates: Any, strengths: Any, contents: Any, reset: Any,
        reads: Any, memory_out: Any, weight_history: Any, slot_history: Any, erased_rows: Any,
        snapshots: Any, shared: bool, eps: float, initial_value: float, snapshot_every: int,
        need_memory_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.lrua_scan_backward(
            grad_reads, grad_memory, grad_read_weights, memory, read_weights, keys, gates,
            strengths, contents, reset, reads, memory_out, weight_history, slot_history,
            erased_rows, snapshots, shared, eps, initial_value, snapshot_every, need_memory_grad,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # Gradients, memory, read_weights, keys, gates, strengths, contents, reset; slot_history.
        ctx.save_for_backward(*inputs[:10], inputs[13])
        ctx.shared, ctx.eps, ctx.initial_value, _, ctx.need_memory_grad = inputs[16:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, reset, slots = ctx.saved_tensors
        present = [i for i, x in enumerate(inputs) if x is not None]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(inputs)
            for i, value in zip(present, values, strict=True):
                full[i] = value
            primals = [i for i in present if i >= 3]

            def scan(*arguments: Tensor) -> tuple[Tensor, ...]:
                a: list[Any] = [None] * len(inputs)
                for i, value in zip(primals, arguments, strict=True):
                    a[i] = value
                memory = a[3]
                usage = memory.new_zeros(memory.shape[:2], dtype=a[5].dtype)
                return reference.lrua_scan(
                    memory, a[4], usage, a[5], a[6], a[7], a[8], reset,
                    least_used="shared" if ctx.shared else "per_head", eps=ctx.eps,
                    initial_value=ctx.initial_value, slots=slots,
                )[:3]  # fmt: skip

            outputs, pullback = torch.func.vjp(scan, *(full[i] for i in primals))[:2]
            cotangents = tuple(
                torch.zeros_like(out) if full[i] is None else full[i]
                for i, out in enumerate(outputs)
            )
            return pullback(cotangents)

        results, pullback = torch.func.vjp(first_order, *(inputs[i] for i in present))[:2]
        # first_order returns gradients of what is present of (memory, read_weights, keys, gates,
        # strengths, contents), in that order.
        given = [grads[i - 3] for i in present if i >= 3]
        cotangents = tuple(
            torch.zeros_like(result) if grad is None or grad.shape != result.shape else grad
            for grad, result in zip(given, results, strict=True)
        )
        out: list[Tensor | None] = [None] * 21
        for i, grad in zip(present, pullback(cotangents), strict=True):
            out[i] = grad
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [
            _common.fold(x, dim, axis, size)
            for x, dim, axis in zip(args[:16], in_dims[:16], _BACKWARD_AXES, strict=True)
        ]
        output = _ScanBackward.apply(
            *[x if i == 3 else _contiguous(x) for i, x in enumerate(folded)], *args[16:]
        )
        pairs = [
            _common.unfold(x, axis, size)
            for x, axis in zip(output, _BACKWARD_OUTPUT_AXES, strict=True)
        ]
        return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)


def _scan_fake(
    memory: Tensor, read_weights: Tensor, usage: Tensor, keys: Tensor, gates: Tensor,
    strengths: Tensor | None, contents: Tensor | None, reset: Tensor | None, usage_decay: float,
    shared: bool, eps: float, initial_value: float, snapshot_every: int, chunk: int,
    save_for_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, slots, width = memory.shape
    steps, _, heads, _ = keys.shape
    chosen = min(heads, slots)
    empty = memory.new_empty
    history = [keys.new_empty(0), empty(0, dtype=torch.long), empty(0), empty(0)]
    if save_for_backward:
        saved = steps // snapshot_every if snapshot_every > 0 else 0
        history = [
            keys.new_empty(steps, batch, heads, padded(slots)),
            empty((steps, batch, chosen), dtype=torch.long),
            empty(0) if snapshot_every == 1 else empty(steps, batch, chosen, width),
            empty(saved, batch, padded(slots) * width),
        ]
    return (
        torch.empty_like(keys), empty(batch, slots, width), torch.empty_like(read_weights),
        torch.empty_like(usage), *history,
    )  # fmt: skip


def _scan_backward_fake(
    grad_reads: Tensor, grad_memory: Tensor | None, grad_read_weights: Tensor | None,
    memory: Tensor, read_weights: Tensor, keys: Tensor, gates: Tensor, strengths: Tensor | None,
    contents: Tensor | None, reset: Tensor | None, reads: Tensor, memory_out: Tensor,
    weight_history: Tensor, slot_history: Tensor, erased_rows: Tensor, snapshots: Tensor,
    shared: bool, eps: float, initial_value: float, snapshot_every: int, need_memory_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        memory.new_empty(memory.shape if need_memory_grad else (0,)),
        torch.empty_like(read_weights),
        torch.empty_like(keys),
        torch.empty_like(gates),
        keys.new_empty(0) if strengths is None else torch.empty_like(strengths),
        keys.new_empty(0) if contents is None else torch.empty_like(contents),
    )


if _library.native_available():
    torch.library.register_fake("mann_ext::lrua_scan")(_scan_fake)
    torch.library.register_fake("mann_ext::lrua_scan_backward")(_scan_backward_fake)
