"""The LRUA memory as one would write it in PyTorch: the opponent of the native kernels.

Written for speed with what eager PyTorch has: batched matrix products, and ``topk`` for the
least-used slots. The same mathematics as mann_ext.reference but for the order of ties.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eager_step(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    gates: Tensor,
    strengths: Tensor | None,
    usage_decay: float = 0.99,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step with per-head least-used slots: reads (B, R, W) and the new state."""
    heads = keys.shape[1]
    slots = usage.topk(heads, dim=-1, largest=False).indices
    least = torch.nn.functional.one_hot(slots, usage.shape[-1]).to(memory.dtype)
    gate = gates.unsqueeze(-1)
    write_weights = gate * read_weights + (1 - gate) * least
    kept = 1 - least.sum(1).unsqueeze(-1)
    memory = torch.baddbmm(memory * kept, write_weights.transpose(1, 2), keys)
    norms = keys.norm(dim=-1).unsqueeze(-1) * memory.norm(dim=-1).unsqueeze(1)
    scores = torch.bmm(keys, memory.transpose(1, 2)) / (norms + eps)
    if strengths is not None:
        scores = scores * strengths.unsqueeze(-1)
    read_weights = scores.softmax(-1)
    reads = torch.bmm(read_weights, memory)
    with torch.no_grad():
        usage = usage_decay * usage + (read_weights + write_weights).sum(1)
    return reads, memory, read_weights, usage


def eager_scan(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    gates: Tensor,
    strengths: Tensor | None = None,
) -> Tensor:
    """T steps: reads (T, B, R, W)."""
    reads = []
    for t in range(keys.shape[0]):
        strength = None if strengths is None else strengths[t]
        read, memory, read_weights, usage = eager_step(
            memory, read_weights, usage, keys[t], gates[t], strength
        )
        reads.append(read)
    return torch.stack(reads)
