"""The reference against the paper's equations, written out once more as loops over numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mann_ext import reference
from tests.samples import Sample, content_samples, lrua_samples

# What loops over single numbers can do in a moment.
SAMPLES = [s for s in lrua_samples() if s.args[0].numel() * s.args[3].shape[0] <= 3000]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
CONTENT = [s for s in content_samples() if s.args[1].numel() <= 300]
content = pytest.mark.parametrize("sample", CONTENT, ids=lambda s: s.name)


def find(name: str) -> Sample:
    return next(s for s in lrua_samples() if s.name == name)


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / math.fsum(powers) for p in powers]


def cosine(k: np.ndarray, m: np.ndarray, eps: float = 1e-8) -> float:
    return math.fsum(k * m) / (math.sqrt(math.fsum(k * k)) * math.sqrt(math.fsum(m * m)) + eps)


def scan_in_loops(sample: Sample) -> tuple[list[np.ndarray], list[list[list[int]]]]:
    """Equations 2-8 and 17-23, one batch element, step, head and slot after another."""
    given: list[Any] = [None if x is None else x.numpy() for x in sample.args]
    shared = sample.options.get("least_used") == "shared"
    memory, read_weights, usage = (x.copy() for x in given[:3])
    keys, gates, strengths, contents, reset = given[3:]
    steps, batch, heads, _ = keys.shape
    count = usage.shape[1]
    reads = np.zeros_like(keys)
    chosen: list[list[list[int]]] = []
    for t in range(steps):
        chosen.append([])
        for b in range(batch):
            if reset is not None and reset[t, b]:
                memory[b], read_weights[b], usage[b] = 1e-6, 0, 0
                read_weights[b, :, 0] = usage[b, 0] = 1
            order = sorted(zip(usage[b], range(count), strict=True))
            least = [i for _, i in order[: min(heads, count)]]
            chosen[-1].append(least)
            written = np.zeros((heads, count))
            for r in range(heads):
                mine = least if shared else [least[r % len(least)]]
                for i in range(count):
                    gate = gates[t, b, r]
                    written[r, i] = gate * read_weights[b, r, i] + (1 - gate) * (i in mine)
            memory[b, least] = 0
            what = keys if contents is None else contents
            for r in range(heads):
                for i in range(count):
                    memory[b, i] += written[r, i] * what[t, b, r]
            for r in range(heads):
                beta = 1.0 if strengths is None else strengths[t, b, r]
                scores = [beta * cosine(keys[t, b, r], memory[b, i]) for i in range(count)]
                read_weights[b, r] = softmax(scores)
                reads[t, b, r] = read_weights[b, r] @ memory[b]
            usage[b] = 0.99 * usage[b] + read_weights[b].sum(0) + written.sum(0)
    return [reads, memory, read_weights, usage], chosen


@samples
def test_the_reference_is_the_papers_equations(sample: Sample):
    got = reference.lrua_scan(*sample.args, **sample.options)
    expected, chosen = scan_in_loops(sample)
    for x, y in zip(got[:4], expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-10, atol=1e-13)
    if got[4].numel():
        assert got[4].tolist() == chosen


def test_one_step_by_hand():
    """Two slots, one head, gate 1/2: slot 1 is erased and gets half the key, slot 0 the rest."""
    memory = torch.tensor([[[3.0, 0.0], [7.0, 7.0]]], dtype=torch.float64)
    weights = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    usage = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    key, gate = torch.tensor([[[0.0, 4.0]]]).double(), torch.tensor([[0.5]]).double()
    reads, memory, weights, usage, slots = reference.lrua_step(memory, weights, usage, key, gate)
    assert slots.tolist() == [[1]]
    assert memory.tolist() == [[[3.0, 2.0], [0.0, 2.0]]]
    first = 1 / (1 + math.exp(1 - 2 / math.sqrt(13)))  # cosines 2 / sqrt(13) and 1
    want = torch.tensor([first, 1 - first], dtype=torch.float64)
    torch.testing.assert_close(weights[0, 0], want, rtol=1e-7, atol=0)
    torch.testing.assert_close(reads[0, 0], torch.stack([3 * want[0], 2 * want.sum()]))
    torch.testing.assert_close(usage[0], torch.tensor([0.99, 0]).double() + want + 0.5)


@samples
def test_a_scan_is_exactly_a_loop_of_steps(sample: Sample):
    if sample.args[7] is not None or not sample.args[3].numel():
        pytest.skip("a step has no reset, and no steps make no loop")
    state: Any = sample.args[:3]
    sequence = [[None] * len(sample.args[3]) if x is None else x for x in sample.args[3:7]]
    reads = []
    for now in zip(*sequence, strict=True):
        read, *state, _ = reference.lrua_step(*state, *now, **sample.options)
        reads.append(read)
    whole = reference.lrua_scan(*sample.args, **sample.options)
    for x, y in zip((torch.stack(reads), *state), whole[:4], strict=True):
        assert torch.equal(x, y)


@samples
def test_a_trace_is_the_same_scan(sample: Sample):
    reads, memory, weights, usage, slots = reference.lrua_scan(*sample.args, **sample.options)
    trace = reference.lrua_trace(*sample.args, **sample.options)
    steps, batch, heads, width = sample.args[3].shape
    count = memory.shape[1]
    assert trace.memory.shape == (steps, batch, count, width)
    assert trace.read_weights.shape == trace.write_weights.shape == (steps, batch, heads, count)
    assert trace.usage.shape == (steps, batch, count)
    assert torch.equal(trace.slots, slots)
    torch.testing.assert_close(trace.read_weights @ trace.memory, reads)
    if steps:
        assert torch.equal(trace.memory[-1], memory)
        assert torch.equal(trace.read_weights[-1], weights)
        assert torch.equal(trace.usage[-1], usage)


@samples
def test_read_weights_sum_to_one_and_gates_share_the_writing(sample: Sample):
    trace = reference.lrua_trace(*sample.args, **sample.options)
    total = trace.read_weights.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    gates = sample.args[4]
    marked = trace.slots.shape[-1] if sample.options.get("least_used") == "shared" else 1
    if sample.args[7] is None:
        torch.testing.assert_close(trace.write_weights.sum(-1), gates + (1 - gates) * marked)


def test_forced_slots_are_written_whatever_the_usage_says():
    args = [None if x is None else x[:, :] for x in find("typical").args]
    forced = torch.tensor([7, 4]).expand(5, 2, 2)
    plain, given = reference.lrua_scan(*args), reference.lrua_scan(*args, slots=forced)
    assert torch.equal(given[4], forced)
    assert not torch.equal(given[1], plain[1])
    again = reference.lrua_scan(*args, slots=plain[4])
    assert all(torch.equal(x, y) for x, y in zip(again, plain, strict=True))


def test_ties_go_to_the_lowest_slot_and_nan_comes_last():
    nan, inf = float("nan"), float("inf")
    usage = torch.tensor([[nan, 1.0, 0.0, inf, 0.0, -1.0, 0.0, nan]])
    assert reference.least_used_slots(usage, 8).tolist() == [[5, 2, 4, 6, 1, 3, 0, 7]]
    assert reference.least_used_slots(torch.zeros(1, 5000), 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_is_rounded_every_step_and_the_rounded_memory_is_read(dtype: torch.dtype):
    sample = find("typical").to(dtype)
    trace = reference.lrua_trace(*sample.args)
    reads, memory = reference.lrua_scan(*sample.args)[:2]
    assert memory.dtype == dtype
    assert {x.dtype for x in (reads, trace.usage, trace.read_weights)} == {torch.float32}
    before = sample.args[0]
    for t in range(len(reads)):
        kept = before.float().clone()
        for b in range(2):
            kept[b, trace.slots[t, b]] = 0
        after = kept + trace.write_weights[t].transpose(1, 2) @ sample.args[3][t]
        assert torch.equal(trace.memory[t], after.to(dtype))
        assert not torch.equal(trace.memory[t].float(), after)
        torch.testing.assert_close(reads[t], trace.read_weights[t] @ trace.memory[t].float())
        before = trace.memory[t]


def test_a_reset_is_a_new_run():
    sample = find("typical")
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[3, 1] = True
    whole = reference.lrua_scan(*sample.args[:7], reset)
    fresh = reference.fresh_state(2, 2, 20, 6, 1e-6, torch.float64, torch.device("cpu"))
    rest = reference.lrua_scan(*fresh, *(None if x is None else x[3:] for x in sample.args[3:7]))
    plain = reference.lrua_scan(*sample.args)
    assert torch.equal(whole[0][3:, 1], rest[0][:, 1])
    assert torch.equal(whole[0][:, 0], plain[0][:, 0])
    for mine, fresh_run, untouched in zip(whole[1:4], rest[1:4], plain[1:4], strict=True):
        assert torch.equal(mine[1], fresh_run[1])
        assert torch.equal(mine[0], untouched[0])


@pytest.mark.parametrize("what", ["row", "key", "both", "everything"])
def test_zero_vectors_have_finite_first_and_second_derivatives(what: str):
    """|v| has no derivative at 0; it is taken as 0, and NaN must not come of a second one."""
    args: Any = [None if x is None else x.clone() for x in find("typical").args]
    if what in ("row", "both"):
        args[0][:, ::3] = 0
    if what in ("key", "both"):
        args[3][2] = 0
    if what == "everything":
        for x in args:
            if x is not None:
                x.zero_()
    inputs = [args[i].requires_grad_() for i in (0, 1, 3, 4, 5)]
    outputs = reference.lrua_scan(*args)[:3]
    total = torch.stack([x.square().sum() + x.sum() for x in outputs]).sum()
    first = torch.autograd.grad(total, inputs, create_graph=True)
    total = torch.stack([g.square().sum() + g.sum() for g in first]).sum()
    second = torch.autograd.grad(total, inputs)
    for grad in (*first, *second):
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["typical", "shared", "contents", "more_heads_than_slots"])
def test_gradcheck_and_gradgradcheck_of_the_scan(name: str):
    sample = find(name)
    args = [
        x[:2] if i > 2 and x is not None else x  # two steps
        for i, x in enumerate(sample.args)
    ]
    args = [
        x.clone().requires_grad_() if i != 2 and x is not None else x for i, x in enumerate(args)
    ]

    def scan(*a: Any) -> Any:
        return reference.lrua_scan(*a, **sample.options)[:3]

    assert gradcheck(scan, args, fast_mode=True)
    assert gradgradcheck(scan, args, fast_mode=True)


def test_no_gradient_flows_through_the_usage():
    args = [None if x is None else x.clone() for x in find("typical").args]
    args[2].requires_grad_()
    args[3].requires_grad_()
    reads, _, _, usage, _ = reference.lrua_scan(*args)
    assert not usage.requires_grad
    assert torch.autograd.grad(reads.sum(), args[2], allow_unused=True) == (None,)


@content
def test_content_read_is_its_equation(sample: Sample):
    queries, keys, values, strengths, mask = sample.args
    got = reference.content_read(
        queries, keys, values, strengths,
        mask.unsqueeze(-2) if mask is not None and mask.dim() == keys.dim() - 1 else mask,
        **sample.options,
    )  # fmt: skip
    lead = torch.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
    count = keys.shape[-2]
    values = keys if values is None else values
    if mask is None:
        mask = torch.ones(1, count, dtype=torch.bool)
    elif mask.dim() == keys.dim() - 1:
        mask = mask.unsqueeze(-2)
    mask = mask.expand(*lead, queries.shape[-2], count)
    for index in np.ndindex(*lead):
        q, k, v, m = (
            x.expand(*lead, *x.shape[-2:])[index].numpy() for x in (queries, keys, values, mask)
        )
        for row in range(queries.shape[-2]):
            beta = 1.0 if strengths is None else float(strengths.expand(*lead, len(q))[index][row])
            open_slots = [i for i in range(count) if m[row, i]]
            dot = sample.options.get("similarity") == "dot"
            scores = [
                beta * (math.fsum(q[row] * k[i]) if dot else cosine(q[row], k[i]))
                for i in open_slots
            ]
            weights = np.zeros(count)
            weights[open_slots] = softmax(scores) if scores else 0
            np.testing.assert_allclose(got[1][index][row], weights, rtol=1e-10, atol=1e-300)
            np.testing.assert_allclose(got[0][index][row], weights @ v, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_the_content_read():
    for sample in CONTENT[:6]:
        if sample.args[4] is not None and sample.args[4].dim() == 2:
            continue  # that mask is given its axis by the operator
        args = [
            x.clone().requires_grad_() if x is not None and x.dtype != torch.bool else x
            for x in sample.args
        ]

        def read(*a: Any, options: dict[str, Any] = sample.options) -> Any:
            return reference.content_read(*a, **options)

        assert gradcheck(read, args, fast_mode=True)
        assert gradgradcheck(read, args, fast_mode=True)
