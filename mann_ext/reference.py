"""Every operator in plain PyTorch: the definition of what is right.

The LRUA memory is that of Santoro et al., *One-shot learning with memory-augmented neural networks*
(2016). Symbols: M memory (B, N, W); w_r, w_w read and write weights (B, R, N); u usage (B, N);
k keys, a contents (B, R, W); g gates, beta strengths (B, R). B batch, N slots, W slot width,
R heads, T steps. Of an LSTM: h hidden state, c cell (B, H).

The NTM memory is that of Graves et al., *Neural Turing Machines* (2014). Symbols: w weights of all
H heads (B, H, N), the R read heads before the write heads; k keys (B, H, W); beta strengths,
g gates and gamma sharpenings (B, H); s shifts (B, H, 3); e erases and a adds (B, H - R, W). It is
float32 or float64 throughout.

The LRUA's memory keeps its own dtype: it is rounded to it after every write, and what is read is
the rounded memory. Everything else is in the accumulation dtype: float64 for float64 memory, else
float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "LRUATrace",
    "accumulation_dtype",
    "content_read",
    "coordinate_lstm",
    "cosine_similarity",
    "fresh_state",
    "gradient_features",
    "least_used_slots",
    "lrua_scan",
    "lrua_step",
    "lrua_trace",
    "lstm_lrua_scan",
    "ntm_address",
    "ntm_scan",
    "ntm_write",
    "relu_pool",
    "write_weights",
]


class LRUATrace(NamedTuple):
    """What each step of a scan did: read and write weights (T, B, R, N), usage (T, B, N) after the
    step, slots (T, B, n) erased and written, and the memory (T, B, N, W) after the step."""

    read_weights: Tensor
    write_weights: Tensor
    usage: Tensor
    slots: Tensor
    memory: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in for memory of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norm(x: Tensor) -> Tensor:
    """|x| over the last dimension, with gradient 0 (not NaN) where x = 0, to any order."""
    squared = (x * x).sum(-1)
    is_zero = squared == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).sqrt())


def cosine_similarity(keys: Tensor, memory: Tensor, eps: float) -> Tensor:
    """K(k, m) = k . m / (|k| |m| + eps) (eq. 2): (..., R, W), (..., N, W) -> (..., R, N).

    The sums run over the last axis of an elementwise product, not through a matrix product: rows
    that are equal then give equal cosines wherever they sit, which the tie rule depends on.
    """
    dots = (keys.unsqueeze(-2) * memory.unsqueeze(-3)).sum(-1)
    return dots / (_norm(keys).unsqueeze(-1) * _norm(memory).unsqueeze(-2) + eps)


def least_used_slots(usage: Tensor, count: int) -> Tensor:
    """The ``count`` slots of smallest usage, (B, count); ties to the lowest index, NaN last."""
    return torch.sort(usage.detach(), dim=-1, stable=True).indices[..., :count]


def one_hot_slots(slots: Tensor, num_slots: int) -> Tensor:
    """(..., n) -> (..., n, N) bool. (torch's own one_hot fails under vmap.)"""
    return slots.unsqueeze(-1) == torch.arange(num_slots, device=slots.device)


def write_weights(read_weights: Tensor, gates: Tensor, slots: Tensor, least_used: str) -> Tensor:
    """w_w = g w_r,{t-1} + (1 - g) lu (eqs. 6, 22), (B, R, N), from ``read_weights`` of the step
    before, ``gates`` (B, R) and the least-used ``slots`` (B, n)."""
    heads, num_slots = read_weights.shape[-2:]
    one_hot = one_hot_slots(slots, num_slots).to(read_weights.dtype)  # (B, n, N)
    if least_used == "shared":
        least = one_hot.sum(1, keepdim=True).expand_as(read_weights)
    else:
        least = one_hot[:, torch.arange(heads, device=slots.device) % slots.shape[-1]]
    gate = gates.unsqueeze(-1)
    return gate * read_weights + (1 - gate) * least


def fresh_state(
    batch: int,
    heads: int,
    slots: int,
    width: int,
    initial_value: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """An episode's first state: constant memory, read weights and usage one-hot at slot 0."""
    memory = torch.full((1, 1, 1), initial_value, dtype=dtype, device=device)
    one_hot = torch.zeros(slots, dtype=accumulation_dtype(dtype), device=device)
    one_hot[0] = 1
    return (
        memory.expand(batch, slots, width),
        one_hot.expand(batch, heads, slots).clone(),
        one_hot.expand(batch, slots).clone(),
    )


def _step(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    gates: Tensor,
    strengths: Tensor | None,
    contents: Tensor | None,
    usage_decay: float,
    least_used: str,
    eps: float,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, num_slots = read_weights.shape[-2:]
    contents = keys if contents is None else contents

    # 1. The n least-used slots, from the previous usage.
    if slots is None:
        slots = least_used_slots(usage, min(heads, num_slots))

    # 2. Write weights: w_w = g w_r,{t-1} + (1 - g) lu (eqs. 6, 22).
    written = write_weights(read_weights, gates, slots, least_used)

    # 3. Erase those slots, 4. and write: M = erased(M) + sum_r w_w,r a_r^T (eq. 7).
    erased = one_hot_slots(slots, num_slots).any(1).unsqueeze(-1)
    kept = memory.to(keys.dtype).masked_fill(erased, 0.0)
    memory = (kept + written.transpose(1, 2) @ contents).to(memory.dtype)
    stored = memory.to(keys.dtype)

    # 5. Address: w_r = softmax(beta K(k, M)) (eqs. 2, 3).
    scores = cosine_similarity(keys, stored, eps)
    if strengths is not None:
        scores = strengths.unsqueeze(-1) * scores
    read_weights = scores.softmax(-1)

    # 6. Read: r = w_r M (eq. 4).
    reads = read_weights @ stored

    # 7. Usage: u = gamma u + sum_r (w_r + w_w) (eq. 20). No gradient.
    usage = usage_decay * usage.detach() + (read_weights + written).detach().sum(1)
    return reads, memory, read_weights, usage, slots, written


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
    least_used: str = "per_head",
    eps: float = 1e-8,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step: reads, memory, read_weights, usage, slots; ``slots`` (B, n) forces the choice."""
    return _step(
        memory, read_weights, usage, keys, gates, strengths, contents,
        usage_decay, least_used, eps, slots,
    )[:5]  # fmt: skip


def _scan(
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
    initial_value: float,
    slots: Tensor | None,
    trace: list[tuple[Tensor, ...]] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_slots, width = memory.shape
    steps, _, heads, _ = keys.shape
    reads, chosen = [], []
    if reset is not None:
        fresh = fresh_state(
            batch, heads, num_slots, width, initial_value, memory.dtype, memory.device
        )
    for t in range(steps):
        if reset is not None:
            again = reset[t].view(batch, 1, 1)
            memory = torch.where(again, fresh[0], memory)
            read_weights = torch.where(again, fresh[1], read_weights)
            usage = torch.where(again.squeeze(-1), fresh[2], usage)
        read, memory, read_weights, usage, used, written = _step(
            memory, read_weights, usage, keys[t], gates[t],
            None if strengths is None else strengths[t],
            None if contents is None else contents[t],
            usage_decay, least_used, eps, None if slots is None else slots[t],
        )  # fmt: skip
        reads.append(read)
        chosen.append(used)
        if trace is not None:
            trace.append((read_weights, written, usage, used, memory))
    count = min(heads, num_slots)
    if steps == 0:
        no_slots = torch.zeros((0, batch, count), dtype=torch.long, device=keys.device)
        return keys.clone(), memory.clone(), read_weights.clone(), usage.clone(), no_slots
    return torch.stack(reads), memory, read_weights, usage, torch.stack(chosen)


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
    least_used: str = "per_head",
    eps: float = 1e-8,
    initial_value: float = 1e-6,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """T steps: exactly a loop of :func:`lrua_step`, with the state replaced where ``reset`` (T, B).

    ``(reads, memory, read_weights, usage, slots)``; ``slots`` (T, B, n) forces the choice of slots.
    """
    return _scan(
        memory, read_weights, usage, keys, gates, strengths, contents, reset,
        usage_decay, least_used, eps, initial_value, slots, None,
    )  # fmt: skip


def lrua_trace(
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
    least_used: str = "per_head",
    eps: float = 1e-8,
    initial_value: float = 1e-6,
) -> LRUATrace:
    """The same scan, returning what every step did, for analysis and figures."""
    trace: list[tuple[Tensor, ...]] = []
    _scan(
        memory, read_weights, usage, keys, gates, strengths, contents, reset,
        usage_decay, least_used, eps, initial_value, None, trace,
    )  # fmt: skip
    if trace:
        return LRUATrace(*(torch.stack(part) for part in zip(*trace, strict=True)))
    (batch, count, width), heads = memory.shape, keys.shape[2]
    weights = read_weights.new_zeros(0, batch, heads, count)
    slots = torch.zeros((0, batch, min(heads, count)), dtype=torch.long, device=keys.device)
    return LRUATrace(
        weights, weights, usage.new_zeros(0, batch, count), slots,
        memory.new_zeros(0, batch, count, width),
    )  # fmt: skip


def lstm_lrua_scan(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    reads: Tensor,
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    interface_weight: Tensor,
    interface_bias: Tensor,
    strengths: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    key_activation: str = "none",
    write_content: bool = False,
    strength_per_step: bool = False,
    usage_decay: float = 0.99,
    least_used: str = "per_head",
    eps: float = 1e-8,
    initial_value: float = 1e-6,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """T steps of an LSTM and the memory it reads, r_{t-1} fed back to its gates.

    ``weight_ih`` (4H, I + R W), ``weight_hh`` (4H, H) and the biases (4H,) are those of an
    ``nn.LSTM`` of inputs [x_t, r_{t-1}]; ``interface_weight`` (P, H) and its bias (P,) make keys,
    contents if ``write_content``, gates, and strengths if ``strength_per_step`` from h_t.
    ``strengths`` (R,): the same at every step.

    ``(hidden, reads, c, memory, read_weights, usage, slots)``: h_t (T, B, H) and r_t (T, B, R, W)
    of every step, the state after the last; ``slots`` (T, B, n) forces the choice of slots.
    """
    steps, (batch, heads, width) = x.shape[0], reads.shape
    outputs, chosen = [], []
    fresh = fresh_state(
        batch, heads, memory.shape[1], width, initial_value, memory.dtype, memory.device
    )
    for t in range(steps):
        if reset is not None:
            again = reset[t].view(batch, 1, 1)
            h, c = h.masked_fill(again[:, 0], 0.0), c.masked_fill(again[:, 0], 0.0)
            reads = reads.masked_fill(again, 0.0)
            memory = torch.where(again, fresh[0], memory)
            read_weights = torch.where(again, fresh[1], read_weights)
            usage = torch.where(again[:, 0], fresh[2], usage)

        # The LSTM, its gates in the order of nn.LSTM.
        inputs = torch.cat([x[t], reads.flatten(1)], -1)
        gates = inputs @ weight_ih.t() + bias_ih + h @ weight_hh.t() + bias_hh
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()

        # What the memory is given.
        interface = h @ interface_weight.t() + interface_bias
        count = 2 if write_content else 1
        vectors, scalars = interface.tensor_split([count * heads * width], -1)
        if key_activation == "tanh":
            vectors = vectors.tanh()
        keys, *contents = vectors.unflatten(-1, (count, heads, width)).unbind(1)
        write_gates = scalars[:, :heads].sigmoid()
        beta = None if strengths is None else strengths.expand(batch, heads)
        if strength_per_step:
            beta = torch.nn.functional.softplus(scalars[:, heads:])

        reads, memory, read_weights, usage, used, _ = _step(
            memory, read_weights, usage, keys, write_gates, beta,
            contents[0] if write_content else None,
            usage_decay, least_used, eps, None if slots is None else slots[t],
        )  # fmt: skip
        outputs.append((h, reads))
        chosen.append(used)
    if steps == 0:
        count = min(heads, memory.shape[1])
        nothing = torch.zeros((0, batch, count), dtype=torch.long, device=h.device)
        hidden = x.new_zeros(0, *h.shape), x.new_zeros(0, *reads.shape)
        return *hidden, c.clone(), memory.clone(), read_weights.clone(), usage.clone(), nothing
    all_h, all_reads = (torch.stack(part) for part in zip(*outputs, strict=True))
    return all_h, all_reads, c, memory, read_weights, usage, torch.stack(chosen)


def ntm_address(
    memory: Tensor,
    weights: Tensor,
    keys: Tensor,
    strengths: Tensor,
    gates: Tensor,
    shifts: Tensor,
    sharpenings: Tensor,
    *,
    eps: float,
) -> Tensor:
    """The weights (B, H, N) of some heads from theirs of the step before (eqs. 5-9)."""
    # Content: w_c = softmax(beta K(k, M)).
    content = (strengths.unsqueeze(-1) * cosine_similarity(keys, memory, eps)).softmax(-1)

    # Interpolation: w_g = g w_c + (1 - g) w_{t-1}.
    gate = gates.unsqueeze(-1)
    gated = gate * content + (1 - gate) * weights

    # Circular shift: w~(i) = s(-1) w_g(i + 1) + s(0) w_g(i) + s(1) w_g(i - 1).
    down, stay, up = shifts.unsqueeze(-1).unbind(-2)
    shifted = down * gated.roll(-1, -1) + stay * gated + up * gated.roll(1, -1)

    # Sharpening: w = w~^gamma / sum w~^gamma. Any common factor of w~ cancels: with the largest
    # weight at 1 the powers stay in range, and the factor needs no gradient.
    largest = shifted.detach().amax(-1, keepdim=True)
    powers = (shifted / largest) ** sharpenings.unsqueeze(-1)
    return powers / powers.sum(-1, keepdim=True)


def ntm_write(memory: Tensor, weights: Tensor, erases: Tensor, adds: Tensor) -> Tensor:
    """M = M prod_h (1 - w_h e_h^T) + sum_h w_h a_h^T: all erases, then all adds (eqs. 3, 4)."""
    erased = weights.unsqueeze(-1) * erases.unsqueeze(-2)  # (B, heads, N, W)
    return memory * (1 - erased).prod(1) + weights.transpose(1, 2) @ adds


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
) -> tuple[Tensor, Tensor, Tensor]:
    """T steps: ``(reads, memory, weights)``, with the state replaced where ``reset`` (T, B).

    Graves et al. leave the order of reading and writing open. Here, as with the LRUA, what a step
    is given can be read at the same step: the write heads address M_{t-1}, all of them erase and
    then add, and the read heads address and read M_t.
    """
    (batch, num_slots, width), heads = memory.shape, keys.shape[2]
    read_heads = heads - erases.shape[2]
    if reset is not None:
        fresh = fresh_state(
            batch, heads, num_slots, width, initial_value, memory.dtype, memory.device
        )
    reads = []
    for t in range(keys.shape[0]):
        if reset is not None:
            again = reset[t].view(batch, 1, 1)
            memory = torch.where(again, fresh[0], memory)
            weights = torch.where(again, fresh[1], weights)
        heads_now = (weights, keys[t], strengths[t], gates[t], shifts[t], sharpenings[t])
        write_weights = ntm_address(memory, *(x[:, read_heads:] for x in heads_now), eps=eps)
        memory = ntm_write(memory, write_weights, erases[t], adds[t])
        read_weights = ntm_address(memory, *(x[:, :read_heads] for x in heads_now), eps=eps)
        reads.append(read_weights @ memory)  # r = w M (eq. 2)
        weights = torch.cat([read_weights, write_weights], 1)
    if not reads:
        return keys[:, :, :read_heads].clone(), memory.clone(), weights.clone()
    return torch.stack(reads), memory, weights


def content_read(
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    strengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    similarity: str = "cosine",
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """w = softmax(beta s(q, k)), r = w v: (..., Q, K), (..., N, K), (..., N, V) -> (..., Q, V).

    ``mask`` (..., Q or 1, N): True where a slot may be read; a query without any reads zeros.
    """
    values = keys if values is None else values
    stored = keys.to(queries.dtype)
    if similarity == "cosine":
        scores = cosine_similarity(queries, stored, eps)
    else:
        scores = queries @ stored.transpose(-1, -2)
    if strengths is not None:
        scores = strengths.unsqueeze(-1) * scores
    if mask is not None:
        readable = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask & readable, float("-inf"))
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~readable, 0.0)
    return weights @ values.to(queries.dtype), weights


def gradient_features(gradients: Tensor) -> Tensor:
    """g (...) -> (..., 2): (log|g| / 7, sign g) if |g| >= e^-7, else (-1, e^7 g)."""
    size = gradients.abs().clamp(min=math.exp(-7)).log() / 7
    return torch.stack([size, (gradients * math.exp(7)).clamp(-1, 1)], -1)


def coordinate_lstm(
    gradients: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor,
    weight_out: Tensor, bias_out: Tensor,
) -> Tensor:  # fmt: skip
    """y = w_out h_T + b_out (P,) of an LSTM over the features of the gradients (T, P)."""
    h = c = gradients.new_zeros(gradients.shape[1], weight_hh.shape[1])
    for x in gradient_features(gradients).unbind():
        gates = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return (h @ weight_out.T + bias_out).squeeze(-1)


def relu_pool(a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
    """max_pool2d of relu(a) + relu(b) + relu(c), windows of 2 x 2, the last ones cut off."""
    total = F.relu(a)
    for part in (b, c):
        if part is not None:
            total = total + F.relu(part)
    return F.max_pool2d(total, 2, ceil_mode=True)
