"""LRUAMemory and NTMMemory: drop-in modules with explicit state."""

from __future__ import annotations

import doctest
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mann_ext
from mann_ext import LRUAMemory, LRUAState, NTMMemory, NTMState
from mann_ext.memory import lrua, ntm


def make(kind=LRUAMemory, **options):
    torch.manual_seed(0)
    defaults = {"num_slots": 12, "slot_size": 5, "num_reads": 2, "dtype": torch.float64}
    return kind(6, **{**defaults, **options})


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


OPTIONS = [
    (LRUAMemory, {}),
    (
        LRUAMemory,
        {"least_used": "per_head", "read_strength": 10.0, "learn_strength": "per_head"},
    ),
    (
        LRUAMemory,
        {"write_content": True, "key_activation": "tanh", "learn_strength": "per_step"},
    ),
    (NTMMemory, {}),
    (NTMMemory, {"num_writes": 2, "read_strength": 10.0, "key_activation": "tanh"}),
]
options = pytest.mark.parametrize(("kind", "chosen"), OPTIONS)
kinds = pytest.mark.parametrize("kind", [LRUAMemory, NTMMemory])


@options
def test_a_sequence_is_a_loop_of_steps_and_a_chain_of_pieces(kind, chosen):
    memory, x = make(kind, **chosen), inputs(7, 3, 6)
    whole, last = memory(x)
    state, reads = memory.initial_state(3), []
    for t in range(7):
        read, state = memory.step(x[t], state)
        reads.append(read)
    torch.testing.assert_close(torch.stack(reads), whole)
    first, state = memory(x[:3])
    second, state = memory(x[3:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for mine, theirs in zip(state, last, strict=True):
        torch.testing.assert_close(mine, theirs)


@kinds
def test_batch_elements_do_not_see_each_other(kind):
    memory, x = make(kind), inputs(6, 4, 6)
    together = memory(x)[0]
    alone = torch.cat([memory(x[:, b : b + 1])[0] for b in range(4)], 1)
    torch.testing.assert_close(together, alone)


@kinds
@settings(max_examples=15, deadline=None)
@given(ends=st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_reset_starts_a_separate_run(kind, ends):
    memory, x = make(kind), inputs(6, 2, 6)
    mask = torch.zeros(6, 2, dtype=torch.bool)
    mask[:, 1] = torch.tensor(ends)
    got = memory(x, reset_mask=mask)[0]
    cuts = [0, *[t for t in range(1, 6) if ends[t]], 6]
    pieces = [memory(x[a:b, 1:])[0] for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(got[:, 1:], torch.cat(pieces))
    torch.testing.assert_close(got[:, :1], memory(x[:, :1])[0])


@kinds
def test_layouts_agree(kind):
    x = inputs(5, 3, 6)
    reads, state = make(kind)(x)
    first = make(kind, batch_first=True)
    torch.testing.assert_close(first(x.transpose(0, 1))[0].transpose(0, 1), reads)
    single, last = make(kind)(x[:, 0])
    torch.testing.assert_close(single, reads[:, 0])
    assert last.memory.shape == (12, 5)
    again, _ = make(kind)(x[:, 0], type(state)(*(part[0] for part in state)))
    assert again.shape == (5, 10)


@kinds
@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_end_with_their_own_last_state(sort, kind):
    memory, x = make(kind), inputs(6, 4, 6)
    lengths = torch.tensor([6, 4, 4, 1]) if sort else torch.tensor([4, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sort)
    reads, state = memory(packed)
    assert torch.equal(reads.batch_sizes, packed.batch_sizes)
    padded, _ = pad_packed_sequence(reads)
    for b, n in enumerate(lengths.tolist()):
        alone, last = memory(x[:n, b : b + 1])
        torch.testing.assert_close(padded[:n, b], alone[:, 0])
        torch.testing.assert_close(state.memory[b], last.memory[0])


@kinds
def test_the_same_weights_run_with_any_number_of_slots(kind):
    small, large = make(kind, num_slots=3), make(kind, num_slots=300)
    large.load_state_dict(small.state_dict())
    assert large(inputs(4, 2, 6))[1].memory.shape == (2, 300, 5)
    large.num_slots = 3
    torch.testing.assert_close(large(inputs(4, 2, 6))[0], small(inputs(4, 2, 6))[0])


@kinds
def test_state_survives_a_file_read_without_pickle(kind):
    _, state = make(kind)(inputs(4, 2, 6))
    file = io.BytesIO()
    torch.save(state.detach(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, kind.state_class)
    assert all(torch.equal(a, b) for a, b in zip(loaded, state, strict=True))


@options
def test_gradients_reach_every_parameter_and_the_first_state(kind, chosen):
    memory = make(kind, **chosen)
    first, weights = inputs(2, 12, 5), inputs(2, 2, 12).softmax(-1)
    if kind is LRUAMemory:
        state = LRUAState(first.requires_grad_(), weights.requires_grad_(), inputs(2, 12).abs())
    else:
        heads = 2 + memory.num_writes
        state = NTMState(first.requires_grad_(), inputs(2, heads, 12).softmax(-1).requires_grad_())
    memory(inputs(4, 2, 6), state)[0].square().sum().backward()
    for parameter in memory.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert state.memory.grad.abs().sum() > 0
    assert state[1].grad.abs().sum() > 0


@kinds
def test_the_initial_memory_takes_no_space(kind):
    state = kind(4, num_slots=10_000_000, slot_size=64).initial_state(1)
    assert state.memory.untyped_storage().nbytes() == 4


def test_sixteen_bit_storage():
    memory = LRUAMemory(6, memory_dtype=torch.bfloat16)
    reads, state = memory(torch.randn(3, 2, 6))
    assert (reads.dtype, state.memory.dtype) == (torch.float32, torch.bfloat16)


def test_learned_strength_starts_where_it_was_put():
    memory = make(learn_strength="per_head", read_strength=10.0)
    strength = torch.nn.functional.softplus(memory.raw_strength)
    torch.testing.assert_close(strength, torch.full_like(strength, 10.0))


def test_the_ntms_heads_start_as_they_were_told():
    memory = make(NTMMemory, read_strength=10.0, gate_bias=-1.0)
    strengths, gates = memory.interface.bias.split(memory._sizes())[3:5]
    torch.testing.assert_close(torch.nn.functional.softplus(strengths), 10 + 0 * strengths)
    torch.testing.assert_close(gates, -torch.ones_like(gates))
    state = memory.initial_state(2)
    assert (state.memory == 1e-6).all()
    assert state.weights.shape == (2, 3, 12)
    assert (state.weights[..., 0] == 1).all()
    assert state.weights.sum() == 6


def test_the_ntms_write_heads_start_out_moving_on():
    options = {"num_slots": 12, "num_reads": 1, "num_writes": 2, "gate_bias": 1.0}
    memory = NTMMemory(6, advance_bias=9.0, **options)
    *_, gates, sharpenings, shifts = memory.interface.bias.split(memory._sizes())
    assert gates.tolist() == [1.0, -8.0, -8.0], "the read head's is as it was"
    assert len(sharpenings) == 3
    assert (shifts.view(3, 3).argmax(-1)[1:] == 2).all()
    assert shifts[:3].abs().max() < 1
    _, state = memory(0.01 * torch.randn(5, 2, 6))
    assert (state.weights[:, 1:].argmax(-1) == 5).all(), "one slot a step, from slot 0"
    assert (state.weights[:, 1:, 5] > 0.9).all()


@kinds
def test_it_compiles_as_one_graph(kind):
    memory = make(kind)
    x = inputs(3, 2, 6)
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], memory(x)[0])


@pytest.mark.parametrize("module", [lrua, ntm])
def test_the_docstrings_example_runs(module):
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@kinds
def test_the_name_says_what_it_has(kind):
    assert "num_slots=12" in repr(make(kind))
    assert getattr(mann_ext, kind.__name__) is kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots to be a whole number of at least 1"),
        ({"least_used": "all"}, "least_used"),
        ({"learn_strength": True}, "learn_strength"),
        ({"usage_decay": 2.0}, "usage_decay"),
        ({"read_strength": 0.0}, "read_strength > 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_writes": 0}, "num_writes to be a whole number of at least 1"),
        ({"key_activation": "relu"}, "key_activation"),
        ({"read_strength": 0.0}, "read_strength > 0"),
    ],
)
def test_bad_arguments_of_the_ntm_are_named(options, message):
    with pytest.raises(ValueError, match=f"NTMMemory: expected {message}"):
        make(NTMMemory, **options)


@kinds
def test_a_state_of_another_batch_size_says_what_to_do(kind):
    memory = make(kind)
    with pytest.raises(ValueError, match=r"got \(1, 12, 5\); batch size changed\? use initial_sta"):
        memory(inputs(2, 3, 6), memory.initial_state(1))
    with pytest.raises(ValueError, match="module of other sizes"):
        memory(inputs(2, 3, 6), make(kind, num_slots=5).initial_state(3))
    with pytest.raises(ValueError, match="expected x of shape"):
        memory(inputs(2, 3, 7))
