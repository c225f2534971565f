"""MANN and the baselines: one interface, explicit state."""

from __future__ import annotations

import io

import pytest
import torch
from torch.func import functional_call, grad, vmap

from mann_ext.models import LSTM, MANN, FeedForward, MANNState

KINDS = {
    "mann": lambda **o: MANN(6, 3, 8, num_slots=10, slot_size=4, num_reads=2, **o),
    "feedback": lambda **o: MANN(
        6, 3, 8, num_slots=10, slot_size=4, num_reads=2, read_feedback=True, **o
    ),
    "mann_feedforward": lambda **o: MANN(
        6, 3, 8, controller="feedforward", num_slots=10, slot_size=4, num_reads=2, **o
    ),
    "mann_ntm": lambda **o: MANN(
        6, 3, 8, addressing="ntm", num_slots=10, slot_size=4, num_reads=2, **o
    ),
    "ntm_feedback": lambda **o: MANN(
        6, 3, 8, addressing="ntm", num_slots=10, slot_size=4, num_reads=2, read_feedback=True, **o
    ),
    "lstm": lambda **o: LSTM(6, 3, 8, **o),
    "feedforward": lambda **o: FeedForward(6, 3, 8, **o),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **options):
    torch.manual_seed(0)
    return KINDS[kind](dtype=torch.float64, **options)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@kinds
def test_pieces_with_the_state_carried_equal_the_whole(kind):
    model, x = make(kind), inputs(7, 3, 6)
    whole, _ = model(x)
    first, state = model(x[:4])
    second, _ = model(x[4:], state.detach())
    torch.testing.assert_close(torch.cat([first, second]), whole)
    assert whole.shape == (7, 3, 3)


@kinds
def test_a_reset_equals_separate_runs(kind):
    model, x = make(kind), inputs(7, 3, 6)
    mask = torch.zeros(7, 3, dtype=torch.bool)
    mask[4, 1] = True
    got = model(x, reset_mask=mask)[0]
    torch.testing.assert_close(got[4:, 1], model(x[4:, 1:2])[0][:, 0])
    torch.testing.assert_close(got[:, 0], model(x[:, :1])[0][:, 0])


@kinds
def test_every_parameter_has_a_gradient(kind):
    model = make(kind)
    model(inputs(5, 2, 6))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@kinds
def test_compile_and_func_transforms(kind):
    model, x = make(kind), inputs(3, 2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])
    parameters = dict(model.named_parameters())

    def loss(p, sequence):
        return functional_call(model, p, (sequence.unsqueeze(1),))[0].square().sum()

    each = vmap(grad(loss), (None, 1))(parameters, x)
    model(x)[0].square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


def test_fused_and_looped_lstm_agree_and_the_loop_differentiates_twice():
    x = inputs(5, 2, 6)
    fused, looped = make("lstm", fused=True), make("lstm", fused=False)
    torch.testing.assert_close(fused(x)[0], looped(x)[0])
    module = torch.nn.LSTM(6, 8, dtype=torch.float64)
    looped.controller.load_state_dict(module.state_dict())
    torch.testing.assert_close(looped.controller(x, looped.initial_state(2))[0], module(x)[0])
    (first,) = torch.autograd.grad(
        looped(x)[0].square().sum(), looped.output.weight, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), looped.controller.weight_ih_l0)
    assert second.abs().sum() > 0


def test_read_feedback_feeds_the_reads_back():
    model = make("feedback")
    assert model.controller.weight_ih_l0.shape[1] == 6 + 8
    state = model.initial_state(2)
    other = state._replace(reads=torch.ones_like(state.reads))
    assert not torch.equal(model(inputs(1, 2, 6), state)[0], model(inputs(1, 2, 6), other)[0])


@pytest.mark.parametrize("kind", ["mann", "mann_ntm"])
def test_state_survives_a_file_read_without_pickle(kind):
    _, state = make(kind)(inputs(3, 2, 6))
    file = io.BytesIO()
    torch.save(state.detach(), file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=True), MANNState)


@pytest.mark.parametrize("kind", ["mann", "feedback", "mann_feedforward", "mann_ntm"])
def test_it_learns_to_repeat_a_label_it_was_shown(kind):
    """Two keys get labels at steps 0 and 1; step 2 shows one of them again."""
    torch.manual_seed(0)
    options = {"read_strength": 5.0, "num_slots": 6, "slot_size": 16}
    if kind == "mann_ntm":
        options["addressing"] = "ntm"
    else:
        options["write_content"] = True
    model = MANN(
        6, 2, 32, num_reads=1, read_feedback=kind == "feedback",
        controller="feedforward" if kind == "mann_feedforward" else "lstm", **options,
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(250):
        label = torch.randint(2, (32,))
        which = torch.randint(2, (32,))
        x = torch.zeros(3, 32, 6)
        for t in range(2):
            x[t, :, t] = 1
            x[t, torch.arange(32), 2 + (label if t == 0 else 1 - label)] = 1
        x[2, torch.arange(32), which] = 1
        x[2, :, 4] = 1
        target = torch.where(which == 0, label, 1 - label)
        loss = torch.nn.functional.cross_entropy(model(x)[0][2], target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.35  # chance is 0.69


@kinds
def test_bad_input_is_named(kind):
    model = make(kind)
    with pytest.raises(ValueError, match=r"expected x of shape \(T, B, 6\)"):
        model(inputs(3, 2, 5))
    with pytest.raises(ValueError, match="reset_mask"):
        model(inputs(3, 2, 6), reset_mask=torch.zeros(2, 3, dtype=torch.bool))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="lstm"):
        MANN(6, 3, controller="gru")
    with pytest.raises(ValueError, match="addressing 'lrua' or 'ntm', got 'dnc'"):
        MANN(6, 3, addressing="dnc")
    with pytest.raises(ValueError, match="batch_first"):
        MANN(6, 3, batch_first=True)
