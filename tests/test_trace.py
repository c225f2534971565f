"""The trace of a memory: what every step did, of the very call that returned it."""

from __future__ import annotations

import io

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from mann_ext import LRUAMemory, LRUAMemoryTrace, LRUAState, reference
from mann_ext.models import MANN
from tests.test_memory import OPTIONS, inputs, make

RESET = torch.zeros(7, 3, dtype=torch.bool)
RESET[4, 1] = RESET[0, 2] = RESET[6, 2] = True
options = pytest.mark.parametrize(
    "chosen", [chosen for kind, chosen in OPTIONS if kind is LRUAMemory]
)
resets = pytest.mark.parametrize("reset", [None, RESET])


def before(memory: LRUAMemory, trace: LRUAMemoryTrace, reset: torch.Tensor | None, t: int):
    """The state that step ``t`` started from."""
    new = memory.initial_state(trace.usage.shape[1])
    if t == 0:
        return new
    parts = (trace.memory[t - 1], trace.read_weights[t - 1], trace.usage[t - 1])
    if reset is None:
        return LRUAState(*parts)
    masks = (reset[t][:, None, None], reset[t][:, None, None], reset[t][:, None])
    return LRUAState(*map(torch.where, masks, new, parts))


@options
@resets
def test_a_trace_is_that_of_the_untraced_run(chosen, reset):
    memory, x = make(**chosen), inputs(7, 3, 6)
    reads, state = memory(x, reset_mask=reset)
    again, last, trace = memory(x, reset_mask=reset, return_trace=True)
    torch.testing.assert_close(again, reads)
    for mine, theirs in zip(last, state, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(trace.memory[-1], last.memory)
    assert torch.equal(trace.read_weights[-1], last.read_weights)
    assert torch.equal(trace.usage[-1], last.usage)
    torch.testing.assert_close((trace.read_weights @ trace.memory).flatten(2), reads)


@options
@resets
def test_every_step_writes_what_the_equations_say(chosen, reset):
    memory, x = make(**chosen), inputs(7, 3, 6)
    _, _, trace = memory(x, reset_mask=reset, return_trace=True)
    for t in range(7):
        start = before(memory, trace, reset, t)
        order = start.usage.sort(stable=True).indices
        assert torch.equal(trace.slots[t], order[:, : trace.slots.shape[-1]])
        kept, least = start.memory.clone(), torch.zeros(3, 2, 12, dtype=torch.float64)
        for b in range(3):
            kept[b, trace.slots[t, b]] = 0
            for head in range(2):
                shared = memory.least_used == "shared"
                least[b, head, trace.slots[t, b] if shared else trace.slots[t, b, head]] = 1
        gate = trace.gates[t].unsqueeze(-1)
        written = gate * start.read_weights + (1 - gate) * least  # eq. 22
        torch.testing.assert_close(trace.write_weights[t], written)
        added = written.transpose(1, 2) @ trace.contents[t]
        torch.testing.assert_close(trace.memory[t] - kept, added)
        both = (trace.read_weights[t] + written).sum(1)
        torch.testing.assert_close(trace.usage[t], memory.usage_decay * start.usage + both)
        assert torch.equal(trace.contents[t], trace.keys[t]) != memory.write_content
        cosine = reference.cosine_similarity(trace.keys[t], trace.memory[t], 1e-8)
        weights = (trace.strengths[t].unsqueeze(-1) * cosine).softmax(-1)
        torch.testing.assert_close(trace.read_weights[t], weights)


def test_a_trace_has_no_gradient_and_the_reads_have_theirs():
    memory, x = make(), inputs(4, 2, 6)
    reads, _, trace = memory(x, return_trace=True)
    assert not any(part.requires_grad for part in trace)
    traced = torch.autograd.grad(reads.square().sum(), list(memory.parameters()))
    plain = torch.autograd.grad(memory(x)[0].square().sum(), list(memory.parameters()))
    for mine, theirs in zip(traced, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_trace_is_laid_out_as_the_input():
    x = inputs(5, 3, 6)
    _, _, trace = make()(x, return_trace=True)
    assert trace.memory.shape == (5, 3, 12, 5)
    assert trace.read_weights.shape == trace.write_weights.shape == (5, 3, 2, 12)
    assert trace.usage.shape == (5, 3, 12)
    assert trace.keys.shape == trace.contents.shape == (5, 3, 2, 5)
    assert trace.slots.shape == trace.gates.shape == trace.strengths.shape == (5, 3, 2)
    _, _, first = make(batch_first=True)(x.transpose(0, 1), return_trace=True)
    _, _, single = make()(x[:, 0], return_trace=True)
    for whole, swapped, alone in zip(trace, first, single, strict=True):
        torch.testing.assert_close(swapped.transpose(0, 1), whole)
        torch.testing.assert_close(alone, whole[:, 0])


def test_a_trace_goes_on_from_a_state_and_of_sixteen_bits():
    memory, x = make(dtype=torch.float32, memory_dtype=torch.bfloat16), inputs(6, 2, 6).float()
    _, _, whole = memory(x, return_trace=True)
    _, middle = memory(x[:2])
    _, _, rest = memory(x[2:], middle, return_trace=True)
    assert rest.memory.dtype == torch.bfloat16
    for mine, theirs in zip(rest, whole, strict=True):
        torch.testing.assert_close(mine, theirs[2:])


def test_a_trace_survives_a_file_read_without_pickle():
    _, _, trace = make()(inputs(4, 2, 6), return_trace=True)
    file = io.BytesIO()
    torch.save(trace, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, LRUAMemoryTrace)
    assert all(torch.equal(a, b) for a, b in zip(loaded, trace, strict=True))
    assert isinstance(torch.utils._pytree.tree_map(torch.zeros_like, trace), LRUAMemoryTrace)


@pytest.mark.parametrize("feedback", [False, True])
@resets
def test_a_networks_trace_is_its_memorys(feedback, reset):
    torch.manual_seed(0)
    model = MANN(6, 3, 8, num_slots=10, slot_size=4, num_reads=2, read_feedback=feedback).double()
    x = inputs(7, 3, 6)
    plain, state = model(x, reset_mask=reset)
    logits, last, trace = model(x, reset_mask=reset, return_trace=True)
    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(last.memory.memory, state.memory.memory)
    assert trace.memory.shape == (7, 3, 10, 4)
    assert torch.equal(trace.memory[-1], last.memory.memory)
    assert torch.equal(trace.usage[-1], last.memory.usage)


def test_what_cannot_be_traced_says_what_to_do():
    with pytest.raises(ValueError, match="return_trace does not go with a PackedSequence; pass pa"):
        make()(pack_sequence([inputs(3, 6)]), return_trace=True)
    with pytest.raises(ValueError, match="LRUAMemory: return_trace needs at least one step"):
        make()(inputs(0, 2, 6), return_trace=True)
    with pytest.raises(ValueError, match="MANN: return_trace needs at least one step"):
        MANN(6, 3, 8).double()(inputs(0, 2, 6), return_trace=True)
