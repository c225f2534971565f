"""lstm_lrua_scan: the native kernels against the reference, and MANN against its loop of steps."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mann_ext import _library, ops, reference
from mann_ext._library import backend
from mann_ext.models import MANN
from mann_ext.ops import lstm_lrua as module
from tests.samples import Sample, _lstm_lrua_sample, lstm_lrua_samples
from tests.test_lrua import relative

native = pytest.mark.skipif(
    "lstm_lrua_scan" not in _library.native_operators("cpu"), reason="operators are not built"
)
SAMPLES = lstm_lrua_samples()
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
FORMS: dict[str, dict[str, Any]] = {
    "saved": {"snapshot_every": 1},
    "rolled_back": {"snapshot_every": 0},
    "every_3": {"snapshot_every": 3},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
ARGUMENTS = (
    "x", "h", "c", "reads", "memory", "read_weights", "usage", "weight_ih", "weight_hh", "bias_ih",
    "bias_hh", "interface_weight", "interface_bias", "strengths", "reset",
)  # fmt: skip
USAGE, RESET = ARGUMENTS.index("usage"), ARGUMENTS.index("reset")


def learnt(sample: Sample) -> list[Any]:
    return [
        x if x is None or i in (USAGE, RESET) else x.detach().clone().requires_grad_()
        for i, x in enumerate(sample.args)
    ]


def run(sample: Sample, **form: Any) -> tuple[torch.Tensor, ...]:
    """Six outputs and the gradients of a fixed random projection of them, by the operator."""
    args = learnt(sample)
    options: Any = {**form, **sample.options}
    return _with_gradients(ops.lstm_lrua_scan(*args, **options), args)


def run_reference(sample: Sample, slots: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    args = learnt(sample)
    output = reference.lstm_lrua_scan(*args, slots=slots, **sample.options)
    return _with_gradients(output[:6], args)


def _with_gradients(output: Any, args: list[Any]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    total = output[0].new_zeros(())
    for part in output[:5]:
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        total = total + (part.to(total.dtype) * weight.to(total.dtype)).sum()
    inputs = [x for i, x in enumerate(args) if x is not None and i not in (USAGE, RESET)]
    found = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return (*(x.detach() for x in output), *found)


def raw_arguments(sample: Sample, snapshot_every: int = 0, save: bool = True) -> tuple[Any, ...]:
    args = [x if x is None or i == 4 else x.contiguous() for i, x in enumerate(sample.args)]
    options = sample.options
    return (
        *args, options.get("key_activation") == "tanh", options.get("write_content", False),
        options.get("strength_per_step", False), 0.99, options.get("least_used") == "shared",
        1e-8, 1e-6, snapshot_every, save,
    )  # fmt: skip


def native_slots(sample: Sample) -> torch.Tensor:
    return torch.ops.mann_ext.lstm_lrua_scan(*raw_arguments(sample))[13]


@native
@forms
@samples
def test_native_equals_the_reference_in_float64(sample: Sample, form: dict[str, Any]):
    slots = native_slots(sample)
    for got, want in zip(run(sample, **form), run_reference(sample, slots), strict=True):
        # One slot: the exact gradient is zero, and rounding is that of terms of order one.
        scale = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11 * scale)


@native
@samples
def test_native_chooses_the_same_slots_unforced(sample: Sample):
    chosen = native_slots(sample)
    expected = reference.lstm_lrua_scan(*sample.args, **sample.options)[6]
    assert (chosen == expected).double().mean() >= 0.999 or chosen.numel() == 0


def neighbours(sample: Sample) -> list[Sample]:
    """The same numbers moved a little, which round differently but amplify rounding alike."""
    found = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        moved = tuple(
            x
            if x is None or x.dtype == torch.bool
            else x * (1 + 1e-5 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
            for x in sample.args
        )
        found.append(Sample(sample.name, moved, sample.options).to(torch.float32))
    return found


@native
@pytest.mark.parametrize("form", ["saved", "rolled_back"])
@samples
def test_float32_error_is_at_most_twice_the_references_own(sample: Sample, form: str):
    """Root mean square over neighbours: what is fed back amplifies rounding, so one is luck."""
    mine, theirs = [], []
    for single in neighbours(sample):
        slots = native_slots(single)
        exact = run_reference(single.to(torch.float64), slots)
        got, plain = run(single, **FORMS[form]), run_reference(single, slots)
        mine.append([relative(*pair) for pair in zip(got, exact, strict=True)])
        theirs.append([relative(*pair) for pair in zip(plain, exact, strict=True)])
    ours, allowed = (torch.tensor(x).square().mean(0).sqrt() for x in (mine, theirs))
    # With one slot the softmax's gradient is zero and the reference subtracts a number from itself,
    # where one pass subtracts two sums of it.
    floor = 64 if sample.args[4].shape[1] == 1 else 8
    assert (ours <= 2 * allowed + floor * torch.finfo(torch.float32).eps).all(), (ours, allowed)


@native
@pytest.mark.parametrize("name", ["typical", "everything", "several_blocks"])
def test_sixteen_bit_memory_is_rounded_every_step(name: str):
    stored = next(s for s in SAMPLES if s.name == name).to(torch.bfloat16)
    got, want = run(stored), run_reference(stored, native_slots(stored))
    assert (got[0].dtype, got[3].dtype) == (torch.float32, torch.bfloat16)
    # A sum formed in another order may round to the neighbouring number, and that feeds back.
    ulp = torch.finfo(torch.bfloat16).eps
    assert all(relative(a, b) <= 2 * ulp for a, b in zip(got[:6], want[:6], strict=True))
    assert all(relative(a, b) <= 16 * ulp for a, b in zip(got[6:], want[6:], strict=True))


def test_nothing_is_saved_without_gradients():
    sample = SAMPLES[0]
    want = ops.lstm_lrua_scan(*learnt(sample), **sample.options)
    with torch.no_grad():
        got = ops.lstm_lrua_scan(*sample.args, **sample.options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    if _library.native_available():
        history = torch.ops.mann_ext.lstm_lrua_scan(*raw_arguments(sample, save=False))[6:]
        assert all(x.numel() == 0 for x in history)


@pytest.mark.parametrize("which", range(5))
def test_the_gradient_of_one_output_alone(which: int):
    sample, results = next(s for s in SAMPLES if s.name == "everything"), []
    for function in (ops.lstm_lrua_scan, reference.lstm_lrua_scan):
        args = learnt(sample)
        total = function(*args, **sample.options)[which].sin().sum()
        inputs = [x for i, x in enumerate(args) if x is not None and i not in (USAGE, RESET)]
        results.append(
            torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


@native
def test_an_input_without_gradient_gets_none_computed():
    sample = SAMPLES[0]
    args = [
        x if i == 7 else x.detach() if x is not None else x for i, x in enumerate(learnt(sample))
    ]
    output = ops.lstm_lrua_scan(*args)
    found = {}

    def note(*call: Any) -> Any:
        found["x"], found["memory"] = (result := backward(*call))[0], result[4]
        return result

    backward = torch.ops.mann_ext.lstm_lrua_scan_backward
    with mock.patch.object(torch.ops.mann_ext, "lstm_lrua_scan_backward", note):
        output.reads.sum().backward()
    assert args[7].grad.abs().sum() > 0
    assert found["x"].numel() == found["memory"].numel() == 0


SMALL = ["typical", "contents", "strength_per_step", "reset", "one_of_each", "shared", "tanh"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_first_and_second_derivatives(name: str, form: dict[str, Any]):
    sample = next(s for s in SAMPLES if s.name == name)
    args = learnt(Sample(name, (sample.args[0][:3], *sample.args[1:])))
    if args[RESET] is not None:
        args[RESET] = args[RESET][:3]

    def scan(*a):
        return ops.lstm_lrua_scan(*a, **form, **sample.options)[:5]

    assert gradcheck(scan, args, fast_mode=True)
    assert gradgradcheck(scan, args, fast_mode=True)


@native
@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.args[0].numel()], ids=lambda s: s.name)
def test_opcheck(sample: Sample, every: int):
    utils = ("test_schema", "test_faketensor")
    forward, operators = raw_arguments(sample, every), torch.ops.mann_ext
    torch.library.opcheck(operators.lstm_lrua_scan.default, forward, test_utils=utils)
    hidden, reads, _, memory, weights, _, *history = operators.lstm_lrua_scan(*forward)
    strengths, reset = forward[13:15]
    backward = (
        torch.ones_like(hidden), torch.ones_like(reads), None, None, torch.ones_like(weights),
        *forward[:6], *forward[7:9], forward[11], strengths, reset, hidden, reads, memory,
        *history, *forward[15:18], *forward[19:22], every,
    )  # fmt: skip
    for need in (False, True):
        torch.library.opcheck(
            operators.lstm_lrua_scan_backward.default, (*backward, need, need), test_utils=utils
        )


@native
@pytest.mark.parametrize("shape", [(8, 1, 4096, 64), (6, 16, 128, 8), (6, 33, 20, 6)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape):
    steps, batch, slots, width = shape
    sample = _lstm_lrua_sample("threads", steps, batch, slots, width, 3, 30, 21, reset=True)
    single, before = sample.to(torch.float32), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(single, snapshot_every=0))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_pieces_with_the_state_carried_equal_the_whole():
    sample = _lstm_lrua_sample("pieces", 7)
    x, h, c, reads, memory, weights, usage, *rest = sample.args
    whole = ops.lstm_lrua_scan(*sample.args)
    state, pieces = (h, c, reads, memory, weights, usage), []
    for part in x.split([3, 1, 3]):
        out = ops.lstm_lrua_scan(part, *state, *rest)
        pieces.append(out.reads)
        state = (out.hidden[-1], out.c, out.reads[-1], *out[3:])
    torch.testing.assert_close(torch.cat(pieces), whole.reads)
    torch.testing.assert_close(state[3:], whole[3:])


def test_a_reset_forgets_everything_even_nan():
    sample = _lstm_lrua_sample("nan", 4)
    args = learnt(sample)
    with torch.no_grad():
        for i in range(1, 7):
            args[i][1] = torch.nan
    args[RESET] = torch.zeros(4, 2, dtype=torch.bool)
    args[RESET][0, 1] = True
    output = ops.lstm_lrua_scan(*args)
    assert output.reads.isfinite().all()
    inputs = [x for i, x in enumerate(args) if x is not None and i not in (USAGE, RESET)]
    for grad in torch.autograd.grad(output.reads.sum() + output.hidden.sum(), inputs):
        assert grad.isfinite().all()


def test_autocast_keeps_the_sums_in_float32():
    args = SAMPLES[0].to(torch.float32).args
    expected = ops.lstm_lrua_scan(*args)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.lstm_lrua_scan(*args)
    assert torch.equal(got.reads, expected.reads)


def test_func_transforms_and_forward_mode_run_in_plain_operations():
    args = SAMPLES[0].args

    def loss(weight):
        return ops.lstm_lrua_scan(*args[:7], weight, *args[8:]).reads.square().sum()

    several = torch.stack([args[7], args[7] + 0.1])
    got = torch.func.vmap(torch.func.grad(loss))(several)
    weight = several[1].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(got[1], want)
    tangent = torch.func.jvp(loss, (several[1],), (several[1],))[1]
    torch.testing.assert_close(tangent, (want * several[1]).sum())


# ---------------------------------------------------------------- the model


CHOICES: list[dict[str, Any]] = [
    {},
    {"read_strength": 10.0, "least_used": "per_head"},
    {"learn_strength": "per_head", "read_strength": 10.0, "write_content": True},
    {"learn_strength": "per_step", "key_activation": "tanh", "usage_decay": 0.9},
]


def make(**options: Any) -> MANN:
    torch.manual_seed(0)
    sizes = {"num_slots": 12, "slot_size": 5, "num_reads": 3, "dtype": torch.float64}
    return MANN(6, 4, 9, read_feedback=True, **{**sizes, **options})


def model_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, 6, dtype=torch.float64, generator=generator)
    return x, torch.rand(7, 5, generator=generator) < 0.2


@pytest.mark.parametrize("chosen", CHOICES)
def test_the_model_equals_its_loop_of_steps(chosen: dict[str, Any]):
    fused, looped = make(**chosen), make(fused=False, **chosen)
    (x, mask), results = model_inputs(), []
    for model in (fused, looped):
        before = model.initial_state(5)
        state = before._replace(reads=torch.ones_like(before.reads).requires_grad_())
        y, last = model(x, state, reset_mask=mask)
        total = y.square().sum() + last.reads.sum() + sum(part.sum() for part in last.controller)
        total = total + last.memory.memory.square().sum() + last.memory.read_weights.square().sum()
        inputs = [*model.parameters(), state.reads]
        results.append((y, *last.controller, *last.memory, last.reads,
                        *torch.autograd.grad(total, inputs)))  # fmt: skip
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@native
def test_the_model_runs_the_operator_where_it_can(monkeypatch: pytest.MonkeyPatch):
    calls: list[MANN] = []

    def note(self: MANN, x: Any, state: Any, reset_mask: Any) -> Any:
        calls.append(self)
        return self._stepwise(x, state, reset_mask, return_trace=False)[:2]

    monkeypatch.setattr(MANN, "_fused", note)
    (x, _), single = model_inputs(), make(dtype=torch.float32)
    make()(x)
    single(x.float())
    single(x.float(), single.initial_state(5))
    make(memory_dtype=torch.bfloat16, dtype=torch.float32)(x.float())
    assert len(calls) == 4
    calls.clear()
    make(fused=False)(x)
    make(controller="feedforward")(x)
    make(memory_dtype=torch.float64, dtype=torch.float32)(x.float())
    torch.func.grad(lambda x: make()(x)[0].sum())(x)
    with torch.autocast("cpu", torch.bfloat16):
        single(x.float())
    with backend("reference"):
        make()(x)
    assert not calls


@pytest.mark.parametrize("function", ["compile", "export"])
@pytest.mark.parametrize("reset", [False, True])
def test_compile_and_export_of_the_model(function: str, reset: bool):
    model, (x, mask) = make(), model_inputs()
    given = (x, None)
    options = {"reset_mask": mask} if reset else {}
    changed: Any
    if function == "export":
        changed = torch.export.export(model, given, options).module()
    else:
        changed = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = changed(*given, **options)[0], model(*given, **options)[0]
    torch.testing.assert_close(got, want)
    if function == "compile":
        parameters = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(want.square().sum(), parameters),
        )


def test_the_models_state_is_checked_by_name():
    model, (x, _) = make(), model_inputs()
    state = model.initial_state(4)
    for wrong in (state, state._replace(reads=torch.zeros(5, 15, dtype=torch.float64))):
        with pytest.raises(ValueError, match="batch size changed"):
            model(x, wrong)
    with pytest.raises(TypeError, match="expected state to be a tuple of tensors"):
        model(x, model.initial_state(5)._replace(memory=x))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "memory"])
def test_a_wrong_shape_is_named(name: str):
    sample = next(s for s in SAMPLES if s.name == "reset")
    given = dict(zip(ARGUMENTS, sample.args, strict=True))
    given[name] = given[name].unsqueeze(0)
    with pytest.raises(ValueError, match=f"lstm_lrua_scan: expected {name} of shape"):
        ops.lstm_lrua_scan(**given)


@pytest.mark.parametrize(
    "name", [name for name in ARGUMENTS if name not in ("memory", "reset", "x")]
)
def test_a_wrong_dtype_is_named(name: str):
    given = dict(zip(ARGUMENTS, SAMPLES[0].args, strict=True))
    given[name] = given[name].float()
    with pytest.raises(TypeError, match=rf"expected {name} of dtype torch.float64 with a memory"):
        ops.lstm_lrua_scan(**given)


def test_other_bad_input_is_named():
    given = dict(zip(ARGUMENTS, SAMPLES[0].args, strict=True))
    for name in ("x", "memory", "weight_hh"):
        with pytest.raises(TypeError, match=rf"expected {name} to be a torch.Tensor, got None"):
            ops.lstm_lrua_scan(**{**given, name: None})
    with pytest.raises(TypeError, match="reset of dtype bool"):
        ops.lstm_lrua_scan(**{**given, "reset": torch.zeros(5, 2)})
    with pytest.raises(ValueError, match="c on cpu as the memory is, got meta"):
        ops.lstm_lrua_scan(**{**given, "c": given["c"].to("meta")})
    with pytest.raises(ValueError, match="key_activation 'none' or 'tanh', got 'relu'"):
        ops.lstm_lrua_scan(**given, key_activation="relu")
    with pytest.raises(ValueError, match="expected strengths None with strength_per_step"):
        ops.lstm_lrua_scan(**given, strength_per_step=True)
    with pytest.raises(ValueError, match=r"\(26, 7\), got \(14, 7\).*write_content=True"):
        ops.lstm_lrua_scan(**given, write_content=True)
    with pytest.raises(ValueError, match="usage_decay"):
        ops.lstm_lrua_scan(**given, usage_decay=1.5)


def test_the_docstrings_example_runs():
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


@native
def test_the_direct_call_of_the_raw_operator_is_checked_too():
    arguments = list(raw_arguments(SAMPLES[0]))
    for i in (0, 5, 7, 11):
        wrong = [*arguments[:i], arguments[i][..., 1:].contiguous(), *arguments[i + 1 :]]
        with pytest.raises(ValueError, match="lstm_lrua_scan"):
            torch.ops.mann_ext.lstm_lrua_scan(*wrong)


@native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_of_the_library(isa):
    environment = {**os.environ, "MANN_EXT_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-x", __file__]
    command += ["-k", "equals or twice or threads or forgets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
