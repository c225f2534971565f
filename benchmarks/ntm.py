"""The NTM memory against the reference and against the same in fast eager PyTorch, one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks import measure
from mann_ext import ops, reference


def eager_address(
    memory: Tensor, weights: Tensor, keys: Tensor, strengths: Tensor, gates: Tensor,
    shifts: Tensor, sharpenings: Tensor, eps: float = 1e-8,
) -> Tensor:  # fmt: skip
    """As the reference, with a batched matrix product for the dot products of the cosines."""
    norms = keys.norm(dim=-1).unsqueeze(-1) * memory.norm(dim=-1).unsqueeze(1)
    cosine = torch.bmm(keys, memory.mT) / (norms + eps)
    content = (strengths.unsqueeze(-1) * cosine).softmax(-1)
    gated = torch.lerp(weights, content, gates.unsqueeze(-1))
    down, stay, up = shifts.unsqueeze(-1).unbind(-2)
    shifted = down * gated.roll(-1, -1) + stay * gated + up * gated.roll(1, -1)
    powers = shifted ** sharpenings.unsqueeze(-1)
    return powers / powers.sum(-1, keepdim=True)


def eager_scan(
    memory: Tensor, weights: Tensor, keys: Tensor, strengths: Tensor, gates: Tensor,
    shifts: Tensor, sharpenings: Tensor, erases: Tensor, adds: Tensor,
) -> Tensor:  # fmt: skip
    """T steps with one write head as one would write them in PyTorch: reads (T, B, R, W)."""
    reads = []
    heads = [x.unbind() for x in (keys, strengths, gates, shifts, sharpenings, erases, adds)]
    for *controls, erase, add in zip(*heads, strict=True):
        now = (weights, *controls)
        written = eager_address(memory, *(x[:, -1:] for x in now))
        memory = memory * (1 - torch.bmm(written.mT, erase)) + torch.bmm(written.mT, add)
        read = eager_address(memory, *(x[:, :-1] for x in now))
        reads.append(torch.bmm(read, memory))
        weights = torch.cat([read, written], 1)
    return torch.stack(reads)


def scan_inputs(
    steps: int, batch: int, slots: int, width: int, reads: int, writes: int = 1
) -> tuple[Tensor, ...]:
    """Arguments of ntm_scan as at an episode's start."""
    torch.manual_seed(0)
    heads = reads + writes
    memory, weights, _ = reference.fresh_state(
        batch, heads, slots, width, 1e-6, torch.float32, torch.device("cpu")
    )
    shape = (steps, batch, heads)
    return (
        memory, weights, torch.randn(*shape, width).tanh(), torch.full(shape, 10.0),
        torch.randn(shape).sigmoid(), torch.randn(*shape, 3).softmax(-1),
        1 + softplus(torch.randn(shape)), torch.randn(steps, batch, writes, width).sigmoid(),
        torch.randn(steps, batch, writes, width),
    )  # fmt: skip


def training_scan(scan: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """Forward and backward, gradients to all that a controller gives."""
    state, learnt = inputs[:2], [x.clone().requires_grad_() for x in inputs[2:]]

    def run() -> None:
        torch.autograd.grad(scan(*state, *learnt).sum(), learnt)

    return run


def run(repeats: int = 15) -> dict[str, Any]:
    """Rows at the sizes of the paper's few-shot task, and of a larger memory."""
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for steps, batch, slots, width, reads in ((50, 16, 128, 40, 4), (20, 4, 4096, 64, 4)):
            inputs = scan_inputs(steps, batch, slots, width, reads)
            contenders: dict[str, Callable[..., Tensor]] = {
                "native": lambda *a: ops.ntm_scan(*a).reads,
                "eager": eager_scan,
                "reference": lambda *a: reference.ntm_scan(*a)[0],
            }
            timed = measure.side_by_side(
                {name: training_scan(scan, inputs) for name, scan in contenders.items()},
                repeats if slots < 1000 else min(repeats, 3),
                1,
            )
            what = f"scan forward + backward, B={batch} N={slots:,} W={width} R={reads} T={steps}"
            rows.append({"what": what, "threads": 1, **timed})
    finally:
        torch.set_num_threads(before)
    return {"machine": measure.machine(), "rows": rows}


def show(report: dict[str, Any]) -> None:
    """Print the rows as a table."""
    table = []
    for row in report["rows"]:
        native = row["native"]["median_ms"]
        table.append([row["what"], native])
        for name in ("eager", "reference"):
            median = row[name]["median_ms"]
            table[-1].append(f"{median:.3g} ms ({median / native:.2f}x)")
    measure.print_table("NTM memory", ["what", "native ms", "eager", "reference"], table)
