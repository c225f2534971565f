"""Content addressing: a softmax read of keys and values, the same tensor or apart."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mann_ext import _library, reference
from mann_ext.ops import _common

__all__ = ["ContentRead", "Similarity", "content_read"]

Similarity = Literal["cosine", "dot"]


class ContentRead(NamedTuple):
    """Reads (..., Q, V) and the weights (..., Q, N) they were made with."""

    reads: Tensor
    weights: Tensor


def content_read(
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    strengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    similarity: Similarity = "cosine",
    eps: float = 1e-8,
) -> ContentRead:
    """Read a memory by content::

        w_q = softmax_i(beta_q s(q, k_i))        s: cosine q . k / (|q| |k| + eps), or dot product
        r_q = sum_i w_q,i v_i

    Args:
        queries: (..., Q, K).
        keys: (..., N, K), float32, float64, bfloat16 or float16.
        values: (..., N, V) in the keys' dtype; None: the keys.
        strengths: (..., Q), the beta; None: 1.
        mask: (..., N) or (..., Q, N) bool, True where a slot may be read. A query that may read no
            slot reads zeros, with zero weights.
        similarity: "cosine" or "dot".
        eps: added to the cosine's denominator; greater than 0.

        Leading dimensions broadcast. Queries and strengths are cast to the accumulation dtype:
        float64 for float64 keys, else float32.

        Made for many slots of up to a few hundred numbers. Of a few slots of many thousands, as
        MetaNet's, take the weights alone and multiply: ``content_read(q, k).weights @ v``.

    Returns:
        reads (..., Q, V) and weights (..., Q, N) in the accumulation dtype, both differentiable.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option does not fit; the message says.
        NotImplementedError: forward-mode differentiation of the native operator.
    """
    op = "content_read"
    _check(op, queries, keys, values, strengths, mask, similarity, eps)
    acc = reference.accumulation_dtype(keys.dtype)
    queries = queries.to(acc)
    strengths = None if strengths is None else strengths.to(acc)
    if mask is not None and mask.dim() == keys.dim() - 1:
        mask = mask.unsqueeze(-2)
    tensors = (queries, keys, values, strengths, mask)
    lead = _leading(op, tensors)
    if not _library.use_native(keys.device, op):
        with _common.without_autocast(keys.device):
            return ContentRead(
                *reference.content_read(
                    queries, keys, values, strengths, mask, similarity=similarity, eps=eps
                )
            )
    _common.check_no_forward_mode(op, queries, keys, values, strengths)

    batch = math.prod(lead)
    flat = [
        None
        if x is None
        else x.expand(*lead, *x.shape[x.dim() - tail :])
        .reshape(batch, *x.shape[x.dim() - tail :])
        .contiguous()
        for x, tail in zip(tensors, _TAILS, strict=True)
    ]
    reads, weights = _common.apply(op, _Read, *flat, similarity == "cosine", float(eps))
    return ContentRead(
        reads.reshape(*lead, *reads.shape[1:]), weights.reshape(*lead, *weights.shape[1:])
    )


_TAILS = (2, 2, 2, 1, 2)  # dimensions of (queries, keys, values, strengths, mask) that do not lead


def _leading(op: str, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """The leading dimensions broadcast together."""
    names = ("queries", "keys", "values", "strengths", "mask")
    given = {
        name: tuple(x.shape[: x.dim() - tail])
        for name, x, tail in zip(names, tensors, _TAILS, strict=True)
        if x is not None
    }
    lead = [1] * max(len(shape) for shape in given.values())
    for shape in given.values():
        for i, size in enumerate(shape, len(lead) - len(shape)):
            if lead[i] == 1:
                lead[i] = size
            elif size != 1 and size != lead[i]:
                found = ", ".join(f"{name} {_common.describe(x)}" for name, x in given.items())
                raise ValueError(
                    f"{op}: expected leading dimensions that broadcast together, got {found}; "
                    "each size must be the same or 1"
                )
    return tuple(lead)


def _check(
    op: str,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    strengths: Tensor | None,
    mask: Tensor | None,
    similarity: str,
    eps: float,
) -> None:
    if keys is None or queries is None:
        raise TypeError(f"{op}: expected queries and keys to be tensors, got None")
    _common.check_tensors(
        op, queries=queries, keys=keys, values=values, strengths=strengths, mask=mask
    )
    _common.check_memory_dtype(op, "keys", keys)
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor is not None and tensor.dim() < 2:
            raise ValueError(
                f"{op}: expected {name} of shape (..., rows, width), got "
                f"{_common.describe(tensor.shape)}; add a row dimension with .unsqueeze(0)"
            )
    slots, width = keys.shape[-2:]
    if min(slots, width) < 1:
        raise ValueError(f"{op}: expected keys with at least one slot and column, got {keys.shape}")
    if queries.shape[-1] != width:
        raise ValueError(
            f"{op}: expected queries as wide as the keys ({width}), got {queries.shape[-1]}"
        )
    if values is not None:
        if values.shape[-2] != slots:
            raise ValueError(
                f"{op}: expected one value a key ({slots}), got {values.shape[-2]} values"
            )
        if values.dtype != keys.dtype:
            raise TypeError(
                f"{op}: expected values of the keys' dtype {keys.dtype}, got {values.dtype}; "
                "convert one of them"
            )
    if strengths is not None and strengths.shape[-1:] != queries.shape[-2:-1]:
        raise ValueError(
            f"{op}: expected strengths of shape (..., {queries.shape[-2]}), one a query, got "
            f"{_common.describe(strengths.shape)}"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: expected mask of dtype bool, got {mask.dtype}; use mask.bool()")
        rows = 1 if mask.dim() == keys.dim() - 1 else mask.shape[-2]
        if mask.shape[-1] != slots or rows not in (1, queries.shape[-2]):
            raise ValueError(
                f"{op}: expected mask of shape (..., {slots}) with one dimension less than the "
                f"keys, or (..., {queries.shape[-2]}, {slots}), got {_common.describe(mask.shape)}"
            )
    _common.check_floating(op, queries=queries, strengths=strengths)
    _common.check_same_device(
        op, keys, queries=queries, values=values, strengths=strengths, mask=mask
    )
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"{op}: expected similarity 'cosine' or 'dot', got {similarity!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: expected a finite eps > 0, got {eps}")


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Read(torch.autograd.Function):
    # torch.compile takes a variadic forward for the old style with a leading ctx: name everything.
    @staticmethod
    def forward(
        queries: Any, keys: Any, values: Any, strengths: Any, mask: Any, cosine: bool, eps: float
    ) -> tuple[Tensor, ...]:
        return torch.ops.mann_ext.content_read(queries, keys, values, strengths, mask, cosine, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.cosine, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, keys, values, strengths, mask, reads, weights = ctx.saved_tensors
        grad_reads = torch.zeros_like(reads) if grads[0] is None else grads[0].contiguous()
        out = _common.apply_directly(
            _ReadBackward, grad_reads, _contiguous(grads[1]), queries, keys, values, strengths,
            mask, reads, weights, ctx.cosine, ctx.eps,
        )  # fmt: skip
        return (
            out[0], out[1], None if values is None else out[2],
            None if strengths is None else out[3], None, None, None,
        )  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_over_batch(_Read, 5, info.batch_size, in_dims, args)


class _ReadBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_reads: Any, grad_weights: Any, queries: Any, keys: Any, values: Any, strengths: Any,
        mask: Any, reads: Any, weights: Any, cosine: bool, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # The mask is for the double backward alone: masked weights are zero.
        return torch.ops.mann_ext.content_read_backward(
            grad_reads, grad_weights, queries, keys, values, strengths, reads, weights, cosine, eps
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.cosine, ctx.eps = inputs[9:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        present = [i for i, x in enumerate(inputs) if x is not None]
        primals = [i for i in present if i >= 2]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            full: dict[int, Tensor] = dict(zip(present, values, strict=True))

            def read(*arguments: Tensor) -> tuple[Tensor, ...]:
                a = dict(zip(primals, arguments, strict=True))
                return reference.content_read(
                    a[2], a[3], a.get(4), a.get(5), mask,
                    similarity="cosine" if ctx.cosine else "dot", eps=ctx.eps,
                )  # fmt: skip

            outputs, pullback = torch.func.vjp(read, *(full[i] for i in primals))[:2]
            cotangents = tuple(full.get(i, torch.zeros_like(out)) for i, out in enumerate(outputs))
            return pullback(cotangents)

        results, pullback = torch.func.vjp(first_order, *(inputs[i] for i in present))[:2]
        given = [grads[i - 2] for i in primals]
        cotangents = tuple(
            torch.zeros_like(result) if grad is None else grad
            for grad, result in zip(given, results, strict=True)
        )
        out: list[Tensor | None] = [None] * 11
        for i, grad in zip(present, pullback(cotangents), strict=True):
            out[i] = grad
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_over_batch(_ReadBackward, 9, info.batch_size, in_dims, args)


def _vmap_over_batch(
    function: type[torch.autograd.Function],
    tensors: int,
    size: int,
    in_dims: tuple[Any, ...],
    args: tuple[Any, ...],
) -> tuple[Any, Any]:
    folded = [
        _contiguous(_common.fold(x, dim, 0, size))
        for x, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
    ]
    # A placeholder for an absent gradient is one-dimensional and has nothing to unfold.
    pairs = [
        (x, None) if x.dim() == 1 else _common.unfold(x, 0, size)
        for x in function.apply(*folded, *args[tensors:])
    ]
    return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)


def _read_fake(
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    strengths: Tensor | None,
    mask: Tensor | None,
    cosine: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    width = keys.shape[-1] if values is None else values.shape[-1]
    return (
        queries.new_empty(*queries.shape[:2], width),
        queries.new_empty(*queries.shape[:2], keys.shape[1]),
    )


def _read_backward_fake(
    grad_reads: Tensor,
    grad_weights: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    strengths: Tensor | None,
    reads: Tensor,
    weights: Tensor,
    cosine: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(queries),
        torch.empty_like(keys),
        keys.new_empty(0) if values is None else torch.empty_like(values),
        queries.new_empty(0) if strengths is None else torch.empty_like(strengths),
    )


if _library.native_available():
    torch.library.register_fake("mann_ext::content_read")(_read_fake)
    torch.library.register_fake("mann_ext::content_read_backward")(_read_backward_fake)
