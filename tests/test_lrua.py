"""lrua_scan and lrua_step: the native kernels against the reference, and what both promise."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from mann_ext import _library, ops, reference
from mann_ext._library import backend
from tests.samples import Sample, _lrua_sample, lrua_samples

native = pytest.mark.skipif(
    "lrua_scan" not in _library.native_operators("cpu"), reason="native operators are not built"
)
SAMPLES = lrua_samples()
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
smooth = pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if not s.extreme], ids=lambda s: s.name
)
FORMS: dict[str, dict[str, Any]] = {
    "saved": {"snapshot_every": 1},
    "rolled_back": {"snapshot_every": 0, "chunk": 1},
    "every_3": {"snapshot_every": 3},
    "chunks_of_2": {"snapshot_every": 0, "chunk": 2},
    "one_chunk": {"snapshot_every": 0, "chunk": 32},
}
DIFFERENTIABLE = (0, 1, 3, 4, 5, 6)


def run(sample: Sample, **form: Any) -> Any:
    """Outputs and gradients of a fixed random projection of them, by the backend in force."""
    args = [
        x.detach().clone().requires_grad_() if i in DIFFERENTIABLE and x is not None else x
        for i, x in enumerate(sample.args)
    ]
    options: Any = {**form, **sample.options}
    output = ops.lrua_scan(*args, **options)
    return output, _gradients(output, args)


def _gradients(output, args):
    generator = torch.Generator().manual_seed(1)
    total = output[0].new_zeros(())
    for part in output[:3]:
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        total = total + (part.to(total.dtype) * weight.to(total.dtype)).sum()
    inputs = [args[i] for i in DIFFERENTIABLE if args[i] is not None]
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def run_reference(sample: Sample, slots: torch.Tensor | None = None):
    args = [
        x.detach().clone().requires_grad_() if i in DIFFERENTIABLE and x is not None else x
        for i, x in enumerate(sample.args)
    ]
    output = reference.lrua_scan(*args, slots=slots, **sample.options)
    return output, _gradients(output, args)


def native_slots(sample: Sample) -> torch.Tensor:
    a = [x if x is None or i == 0 else x.contiguous() for i, x in enumerate(sample.args)]
    shared = sample.options.get("least_used") == "shared"
    return torch.ops.mann_ext.lrua_scan(*a, 0.99, shared, 1e-8, 1e-6, 0, 1, True)[5]


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """|x - y| / |y|; gradients that are exactly zero are sums of terms of order one."""
    difference = (x.double() - y.double()).norm()
    return (difference / y.double().norm().clamp_min(1.0)).item() if y.numel() else 0.0


@native
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@samples
def test_native_equals_the_reference_in_float64(sample: Sample, form: dict[str, Any]):
    output, grads = run(sample, **form)
    expected, expected_grads = run_reference(sample, native_slots(sample))
    assert torch.equal(native_slots(sample), expected[4])
    for got, want in zip(output, expected[:4], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    if sample.name == "huge":
        return  # gradients overflow the cancellation that both rely on
    for got, want in zip(grads, expected_grads, strict=True):
        # One slot: the exact gradient is zero, and rounding is that of terms of order one.
        scale = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11 * scale)


@native
@samples
def test_native_chooses_the_same_slots_unforced(sample: Sample):
    chosen, expected = native_slots(sample), reference.lrua_scan(*sample.args, **sample.options)[4]
    assert (chosen == expected).double().mean() >= 0.999 or chosen.numel() == 0


@native
@pytest.mark.parametrize("form", ["saved", "rolled_back", "every_3"])
@smooth
def test_float32_error_is_at_most_twice_the_references_own(sample: Sample, form: str):
    same = [next(s for s in lrua_samples(seed) if s.name == sample.name) for seed in range(5)]
    # With one slot the softmax's gradient is zero and the reference subtracts a number from itself,
    # where one pass subtracts two sums of it.
    check_float32(same, form, floor=64 if sample.name == "one_slot" else 8)


# Rows as long as those of memories whose writes are deferred unasked.
DEFERRED: dict[str, dict[str, Any]] = {
    "one_head": {"width": 40, "heads": 1},
    "sharp": {"width": 40, "heads": 1, "strength": 10.0},
    "episode_start": {"width": 40, "heads": 1, "constant": True},
    "shared": {"width": 64, "heads": 2, "least_used": "shared", "contents": True},
    "four_heads": {"width": 128, "heads": 4, "reset": True},
}


@native
@pytest.mark.parametrize("form", ["chunks_of_2", "one_chunk"])
@pytest.mark.parametrize("name", DEFERRED)
def test_float32_error_of_deferred_writes_is_at_most_twice_too(name: str, form: str):
    several = [_lrua_sample(name, 12, 2, 150, seed=s, **DEFERRED[name]) for s in range(9)]
    check_float32(several, form, 2, statistics.median)
    check_float32(several[:5], form)


def check_float32(
    samples: list[Sample], form: str, floor: int = 8, of: Callable[[Any], float] = max
) -> None:
    """The worst error over the samples, of every output and gradient, against the reference's.

    ``of``: another figure than the worst.
    """
    mine, theirs = [], []
    for sample in samples:
        single = sample.to(torch.float32)
        slots = native_slots(single)
        exact = run_reference(single.to(torch.float64), slots)
        plain = run_reference(single, slots)
        got = run(single, **FORMS[form])
        truth = (*exact[0][:4], *exact[1])
        mine.append([relative(*p) for p in zip((*got[0], *got[1]), truth, strict=True)])
        theirs.append([relative(*p) for p in zip((*plain[0][:4], *plain[1]), truth, strict=True)])
    for ours, reference_error in zip(
        zip(*mine, strict=True), zip(*theirs, strict=True), strict=True
    ):
        # The reference may be exact by luck.
        assert of(ours) <= 2 * of(reference_error) + floor * torch.finfo(torch.float32).eps


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@smooth
def test_sixteen_bit_memory_is_rounded_every_step(sample: Sample, dtype: torch.dtype):
    if dtype == torch.float16 and sample.name in ("episode_start", "reset", "reset_shared"):
        pytest.skip("the gradient of rows of 1e-6 overflows float16")
    stored = sample.to(dtype)
    output, grads = run(stored)
    assert output.memory.dtype == dtype
    assert output.reads.dtype == torch.float32
    expected, expected_grads = run_reference(stored, native_slots(stored))
    # A sum formed in another order may round to the neighbouring number, and that feeds back.
    ulp = torch.finfo(dtype).eps
    for got, want in zip(output, expected[:4], strict=True):
        assert relative(got, want) <= 2 * ulp
    for got, want in zip(grads, expected_grads, strict=True):
        assert relative(got, want) <= 16 * ulp


SMALL = [
    s
    for s in SAMPLES
    if not s.extreme
    and s.args[0].numel() <= 300
    and s.args[3].numel()
    and s.name != "episode_start"  # a finite difference there is larger than the memory
]


@native
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sample", SMALL, ids=lambda s: s.name)
def test_gradcheck_and_gradgradcheck(sample: Sample, form: dict[str, Any]):
    args = [
        x.detach().clone()[:4].requires_grad_()
        if i in (3, 4, 5, 6) and x is not None
        else (x[:4] if i == 7 and x is not None else x)
        for i, x in enumerate(sample.args)
    ]
    args[0], args[1] = (x.detach().clone().requires_grad_() for x in args[:2])

    def scan(*a):
        return ops.lrua_scan(*a, **form, **sample.options)[:3]

    assert gradcheck(scan, args, fast_mode=True)
    assert gradgradcheck(scan, args, fast_mode=True)


@native
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.args[3].numel()], ids=lambda s: s.name)
def test_opcheck(sample: Sample):
    a = [x if x is None or i == 0 else x.contiguous() for i, x in enumerate(sample.args)]
    shared = sample.options.get("least_used") == "shared"
    utils = ("test_schema", "test_faketensor")
    for every in (0, 1, 2):
        torch.library.opcheck(
            torch.ops.mann_ext.lrua_scan.default,
            (*a, 0.99, shared, 1e-8, 1e-6, every, 1, True),
            test_utils=utils,
        )
        reads, memory, weights, _, *history = torch.ops.mann_ext.lrua_scan(
            *a, 0.99, shared, 1e-8, 1e-6, every, 1, True
        )
        torch.library.opcheck(
            torch.ops.mann_ext.lrua_scan_backward.default,
            (torch.ones_like(reads), None, torch.ones_like(weights), a[0], a[1], *a[3:], reads)
            + (memory, *history, shared, 1e-8, 1e-6, every, True),
            test_utils=utils,
        )


def tensors(sample: Sample, *names: str):
    return {
        name: x.clone() for name, x in zip(ARGUMENTS, sample.args, strict=True) if x is not None
    }


ARGUMENTS = (
    "memory", "read_weights", "usage", "keys", "gates", "strengths", "contents", "reset",
)  # fmt: skip


@native
def test_func_grad_vmap_and_jacrev_agree_with_the_reference():
    given = tensors(SAMPLES[0])
    keys = given.pop("keys")

    def loss(k):
        return ops.lrua_scan(keys=k, **given).reads.square().sum()

    def jacobian(k):
        return torch.func.jacrev(lambda q: ops.lrua_scan(keys=q, **given).reads.sum((0, 1)))(k)

    several = torch.stack([keys, keys * 0.5, keys + 1])
    got = torch.func.vmap(torch.func.grad(loss))(several), jacobian(keys)
    with backend("reference"):
        want = torch.stack([torch.func.grad(loss)(k) for k in several]), jacobian(keys)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@native
def test_vmap_over_memories_as_well():
    given = tensors(SAMPLES[0])
    memory = torch.stack([given.pop("memory"), torch.ones(2, 20, 6, dtype=torch.float64)])
    out = torch.func.vmap(lambda m: ops.lrua_scan(memory=m, **given))(memory)
    for i in range(2):
        torch.testing.assert_close(out.memory[i], ops.lrua_scan(memory=memory[i], **given).memory)


@native
def test_forward_mode_says_what_to_use():
    given = tensors(SAMPLES[0])
    keys = given.pop("keys")
    with pytest.raises(NotImplementedError, match="jacrev"):
        torch.func.jvp(lambda k: ops.lrua_scan(keys=k, **given).reads, (keys,), (keys,))


@native
def test_compiles_without_a_graph_break_and_exports():
    given = [x.float() if x is not None else None for x in SAMPLES[0].args]
    given[3].requires_grad_()

    class Scan(torch.nn.Module):
        def forward(self, *a):
            return ops.lrua_scan(*a).reads

    expected = Scan()(*given)
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, expected)
    (want,) = torch.autograd.grad(expected.sum(), given[3])
    (got,) = torch.autograd.grad(compiled.sum(), given[3])
    torch.testing.assert_close(got, want)
    program = torch.export.export(Scan(), tuple(given))
    torch.testing.assert_close(program.module()(*given), expected)


def test_autocast_keeps_the_sums_in_float32():
    given = [x.float() if x is not None else None for x in SAMPLES[0].args]
    expected = ops.lrua_scan(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.lrua_scan(*given)
        narrow = ops.lrua_scan(*given[:3], given[3].bfloat16(), *given[4:])
    assert torch.equal(got.reads, expected.reads)
    assert narrow.reads.dtype == torch.float32


@native
@pytest.mark.parametrize("chunk", [1, 3])
def test_threads_and_repetition_change_nothing(chunk: int):
    sample = Sample("large", next(s for s in SAMPLES if s.name == "several_blocks").args)
    wide = [None if x is None else x.float() for x in sample.args]
    generator = torch.Generator().manual_seed(0)
    wide[0] = torch.randn(1, 2500, 128, generator=generator)
    wide[3] = torch.randn(3, 1, 4, 128, generator=generator)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(Sample("large", tuple(wide)), snapshot_every=0, chunk=chunk))
    finally:
        torch.set_num_threads(before)
    for output, grads in results[1:]:
        for x, y in zip((*output, *grads), (*results[0][0], *results[0][1]), strict=True):
            assert torch.equal(x, y)


@native
@samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_which_keeps_no_weights_gives_the_same(sample: Sample, dtype: torch.dtype):
    floating = [x is not None and x.is_floating_point() for x in sample.args]
    args = [x.to(dtype) if f else x for x, f in zip(sample.args, floating, strict=True)]
    if sample.name == "several_blocks":
        args[7] = torch.tensor([[False], [True], [False]])
    learnt = [x.clone().requires_grad_() if f else x for x, f in zip(args, floating, strict=True)]
    trained = ops.lrua_scan(*learnt, **sample.options, chunk=1)
    for x, y in zip(ops.lrua_scan(*args, **sample.options, chunk=1), trained, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=0, atol=0, equal_nan=True)


@samples
def test_a_scan_is_a_loop_of_steps(sample: Sample):
    memory, read_weights, usage, keys, gates, strengths, contents, reset = sample.args
    if reset is not None or not keys.numel():
        return
    state, reads = (memory, read_weights, usage), []
    for t in range(keys.shape[0]):
        out = ops.lrua_step(
            *state, keys[t], gates[t],
            None if strengths is None else strengths[t],
            None if contents is None else contents[t], **sample.options,
        )  # fmt: skip
        state = out[1:]
        reads.append(out.reads)
    whole = ops.lrua_scan(*sample.args, **sample.options)
    torch.testing.assert_close(torch.stack(reads), whole.reads, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state[0], whole.memory, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_ties_go_to_the_lowest_slot(name):
    if name == "native" and not _library.native_available():
        pytest.skip("native operators are not built")
    memory, read_weights, usage = reference.fresh_state(
        1, 2, 200, 3, 1e-6, torch.float32, torch.device("cpu")
    )
    with backend(name):
        out = ops.lrua_step(memory, read_weights, usage, torch.ones(1, 2, 3), torch.zeros(1, 2))
    # Slot 0 is used; of the others, all unused, the first two are written.
    written = (out.memory[0] > 1e-3).all(-1).nonzero().flatten()
    assert written.tolist() == [1, 2]


@native
def test_nan_usage_counts_as_most_used():
    memory, read_weights, usage = (x.clone() for x in SAMPLES[0].args[:3])
    usage[:, :18] = float("nan")
    usage[0, 3] = 7.0
    sample = Sample("nan", (memory, read_weights, usage, *SAMPLES[0].args[3:]))
    assert set(native_slots(sample)[0, 1].tolist()) == {18, 19}
    assert torch.equal(native_slots(sample), reference.lrua_scan(*sample.args)[4])


@native
def test_nan_in_a_key_stays_in_its_batch_element():
    given = tensors(SAMPLES[0])
    given["keys"][2, 0, 0, 0] = float("nan")
    out = ops.lrua_scan(**given)
    assert out.reads[2:, 0].isnan().any()
    assert not out.reads[:2].isnan().any()
    assert not out.reads[:, 1].isnan().any()


def test_erased_slots_receive_no_gradient():
    given = tensors(SAMPLES[0])
    given = {k: v[:1] if k in ("keys", "gates", "strengths") else v for k, v in given.items()}
    given["memory"].requires_grad_()
    out = ops.lrua_scan(**given)
    (grad,) = torch.autograd.grad(out.reads.sum(), given["memory"])
    slots = reference.least_used_slots(given["usage"], 2)
    for b in range(2):
        assert (grad[b, slots[b]] == 0).all()
        assert (grad[b] != 0).any()


def test_no_gradient_crosses_a_reset():
    given = tensors(SAMPLES[0])
    given["reset"] = torch.zeros(5, 2, dtype=torch.bool)
    given["reset"][3, 1] = True
    given["keys"].requires_grad_()
    out = ops.lrua_scan(**given)
    (grad,) = torch.autograd.grad(out.reads[3:].sum(), given["keys"])
    assert (grad[:3, 1] == 0).all()
    assert (grad[:3, 0] != 0).any()


def test_sharp_reads_stay_finite():
    given = tensors(SAMPLES[0])
    given["strengths"] = torch.full_like(given["strengths"], 5000.0)
    given = {k: v.float() for k, v in given.items()}
    out = ops.lrua_scan(**given)
    assert out.reads.isfinite().all()
    torch.testing.assert_close(out.read_weights.sum(-1), torch.ones(2, 2))


@native
@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(0, 5),
    batch=st.integers(0, 3),
    slots=st.integers(1, 140),
    width=st.integers(1, 45),
    heads=st.integers(1, 9),
    shared=st.booleans(),
    contents=st.booleans(),
    reset=st.booleans(),
    form=st.sampled_from(list(FORMS.values())),
    seed=st.integers(0, 1000),
)
def test_any_shape(steps, batch, slots, width, heads, shared, contents, reset, form, seed):
    sample = _lrua_sample(
        str(seed), steps, batch, slots, width, heads, contents=contents, reset=reset,
        least_used="shared" if shared else "per_head",
    )  # fmt: skip
    output, grads = run(sample, **form)
    expected, expected_grads = run_reference(sample, native_slots(sample))
    for got, want in zip((*output, *grads), (*expected[:4], *expected_grads), strict=True):
        scale = float(want.detach().abs().max()) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9 * max(scale, 1.0))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("keys", lambda x: x[:, :1], r"expected keys of shape \(T, 2, R, 6\)"),
        ("gates", lambda x: x[..., :1], "expected gates of shape"),
        ("strengths", lambda x: x[0], "expected strengths of shape"),
        ("usage", lambda x: x[:, :3], "expected usage of shape"),
        ("read_weights", lambda x: x[0], "expected read_weights of shape"),
        ("memory", lambda x: x[0], "expected memory of shape"),
        ("keys", lambda x: x.long(), "floating-point"),
        ("memory", lambda x: x.long(), "float32, float64, bfloat16 or float16"),
        ("keys", lambda x: x.to("meta"), "expected keys on cpu"),
    ],
)
def test_bad_tensors_get_one_clear_error(name, change, message):
    given = tensors(SAMPLES[0])
    given[name] = change(given[name])
    with pytest.raises((ValueError, TypeError), match=message):
        ops.lrua_scan(**given)


@pytest.mark.parametrize(
    ("option", "value"),
    [("eps", 0.0), ("usage_decay", 1.5), ("least_used", "all"), ("usage_decay", float("nan"))],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        ops.lrua_scan(**tensors(SAMPLES[0]), **{option: value})


def test_the_direct_call_of_the_raw_operator_is_checked_too():
    if not _library.native_available():
        pytest.skip("native operators are not built")
    a = list(SAMPLES[0].args)
    a[4] = a[4][:2]
    with pytest.raises(ValueError, match="gates"):
        torch.ops.mann_ext.lrua_scan(*a, 0.99, False, 1e-8, 1e-6, 0, 1, True)


@native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_of_the_library(isa):
    environment = {**os.environ, "MANN_EXT_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-x", __file__, "-k", "equals or sixteen or twice"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@native
def test_the_operator_itself_names_the_whole_shape_it_expects():
    b, n, w, r = 2, 8, 4, 1
    with pytest.raises(
        ValueError, match=r"lrua_scan: expected usage of shape \(2, 8\), got \(3, 8\)"
    ):
        torch.ops.mann_ext.lrua_scan(
            torch.zeros(b, n, w), torch.zeros(b, r, n), torch.zeros(3, n), torch.zeros(1, b, r, w),
            torch.zeros(1, b, r), None, None, None, 0.99, False, 1e-8, 1e-6, 0, 1, False,
        )  # fmt: skip
