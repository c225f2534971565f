"""ntm_scan: the native kernels against the reference, the reference against the paper's equations,
and what both promise."""

from __future__ import annotations

import doctest
import math
import os
import statistics
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from mann_ext import _library, ops, reference
from mann_ext._library import backend
from mann_ext.ops import ntm as module
from tests.samples import Sample, _ntm_sample, ntm_samples

native = pytest.mark.skipif(
    "ntm_scan" not in _library.native_operators("cpu"), reason="native operators are not built"
)
SAMPLES = ntm_samples()
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
smooth = pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if not s.extreme], ids=lambda s: s.name
)
FORMS: dict[str, dict[str, Any]] = {
    "all": {"snapshot_every": 1},
    "every_3": {"snapshot_every": 3},
    "none": {"snapshot_every": 100},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
ARGUMENTS = (
    "memory", "weights", "keys", "strengths", "gates", "shifts", "sharpenings", "erases", "adds",
    "reset",
)  # fmt: skip
OUTPUTS = ("reads", "memory_out", "weights_out", *ARGUMENTS[:9])


def find(name: str, seed: int = 0) -> Sample:
    return next(s for s in ntm_samples(seed) if s.name == name)


def tensors(sample: Sample) -> dict[str, torch.Tensor]:
    return {
        name: x.clone() for name, x in zip(ARGUMENTS, sample.args, strict=True) if x is not None
    }


def run(sample: Sample, scan: Any = None, **form: Any) -> tuple[torch.Tensor, ...]:
    """Outputs, then the gradients of a fixed random projection of them."""
    args: list[Any] = [x.detach().clone().requires_grad_() for x in sample.args[:9]]
    scan = scan or ops.ntm_scan
    output = scan(*args, **form, reset=sample.args[9])
    generator = torch.Generator().manual_seed(1)
    total = output[0].new_zeros(())
    for part in output:
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        total = total + (part * weight.to(part.dtype)).sum()
    grads = torch.autograd.grad(total, args, allow_unused=True, materialize_grads=True)
    return (*(part.detach() for part in output), *grads)


# ---------------------------------------------------------------- the reference


def address_in_loops(memory, previous, key, beta, gate, shift, gamma, eps=1e-8):
    count = len(memory)
    scores = [
        beta * math.fsum(key * m)
        / (math.sqrt(math.fsum(key * key)) * math.sqrt(math.fsum(m * m)) + eps)
        for m in memory
    ]  # fmt: skip
    powers = [math.exp(score - max(scores)) for score in scores]
    content = [power / math.fsum(powers) for power in powers]
    gated = [gate * c + (1 - gate) * w for c, w in zip(content, previous, strict=True)]
    shifted = [
        math.fsum(shift[j + 1] * gated[(i - j) % count] for j in (-1, 0, 1)) for i in range(count)
    ]
    powers = [(w / max(shifted)) ** gamma for w in shifted]
    return np.array([power / math.fsum(powers) for power in powers])


def scan_in_loops(sample: Sample) -> list[np.ndarray]:
    """Equations 2-9, one batch element, step, head and slot after another."""
    given: list[Any] = [None if x is None else x.numpy() for x in sample.args]
    memory, weights = (x.copy() for x in given[:2])
    keys, strengths, gates, shifts, sharpenings, erases, adds, reset = given[2:]
    steps, batch, heads, width = keys.shape
    reads = np.zeros((steps, batch, heads - erases.shape[2], width))
    for t in range(steps):
        for b in range(batch):
            if reset is not None and reset[t, b]:
                memory[b], weights[b] = 1e-6, 0
                weights[b, :, 0] = 1
            controls = (keys[t, b], strengths[t, b], gates[t, b], shifts[t, b], sharpenings[t, b])
            writers = range(reads.shape[2], heads)
            for h in writers:
                weights[b, h] = address_in_loops(
                    memory[b], weights[b, h], *(x[h] for x in controls)
                )
            for i in range(memory.shape[1]):
                for h, e in zip(writers, erases[t, b], strict=True):
                    memory[b, i] = memory[b, i] * (1 - weights[b, h, i] * e)
                for h, a in zip(writers, adds[t, b], strict=True):
                    memory[b, i] = memory[b, i] + weights[b, h, i] * a
            for r in range(reads.shape[2]):
                weights[b, r] = address_in_loops(
                    memory[b], weights[b, r], *(x[r] for x in controls)
                )
                reads[t, b, r] = weights[b, r] @ memory[b]
    return [reads, memory, weights]


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.args[0].numel() < 3000], ids=lambda s: s.name
)
def test_the_reference_is_the_papers_equations(sample: Sample):
    got = reference.ntm_scan(*sample.args)
    for x, y in zip(got, scan_in_loops(sample), strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-9, atol=1e-13)


def test_a_shift_moves_the_weights_around_the_circle():
    memory, one = torch.ones(1, 5, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    weights = torch.tensor([[[0.0, 0, 0, 0, 1]]], dtype=torch.float64)
    for tap, slot in ((0, 3), (1, 4), (2, 0)):
        shift = torch.nn.functional.one_hot(torch.tensor([[tap]]), 3).double()
        moved = reference.ntm_address(
            memory, weights, memory[:, :1], one, 0 * one, shift, one, eps=1e-8
        )
        assert moved[0, 0].argmax() == slot
        assert moved[0, 0, slot] == 1


def test_what_is_written_is_read_at_the_same_step():
    args = list(find("typical").args)
    changed = list(args)
    changed[8] = args[8].clone()
    changed[8][3] += 1
    with backend("reference"):
        before, after = ops.ntm_scan(*args).reads, ops.ntm_scan(*changed).reads
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


def test_first_and_second_derivatives_of_the_reference():
    args = [x[:3] if i > 1 and x is not None else x for i, x in enumerate(find("typical").args)]
    given = [x.detach().clone().requires_grad_() for x in args[:9]]
    assert gradcheck(reference.ntm_scan, given, fast_mode=True)
    assert gradgradcheck(reference.ntm_scan, given, fast_mode=True)


# ---------------------------------------------------------------- the kernels


@native
@forms
@samples
def test_native_equals_the_reference_in_float64(sample: Sample, form: dict[str, Any]):
    got, expected = run(sample, **form), run(sample, reference.ntm_scan)
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert x.shape == y.shape
        if i < 3:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-13)
        elif sample.name != "huge":  # its gradients are differences of terms of 1e12 and more
            scale = max(float(y.abs().max()), 1.0) if y.numel() else 1.0
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10 * scale)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """|x - y| / |y|; gradients that are exactly zero are sums of terms of order one."""
    difference = (x.double() - y).norm()
    return (difference / y.norm().clamp_min(1.0)).item() if y.numel() else 0.0


@native
@pytest.mark.parametrize("form", ["every_3", "none"])
@pytest.mark.parametrize("name", ["reset", "several_write_heads", "tile_and_one"])
def test_a_memory_made_again_is_the_same_to_the_last_bit(name: str, form: str):
    sample = find(name).to(torch.float32)
    for x, y in zip(run(sample, **FORMS[form]), run(sample, snapshot_every=1), strict=True):
        assert torch.equal(x, y)


@native
@smooth
def test_float32_error_is_at_most_twice_the_references_own(sample: Sample):
    """In most of several draws: where terms cancel, either may be the nearer one by luck."""
    excess = []
    for seed in range(11):
        single = find(sample.name, seed).to(torch.float32)
        exact = run(single.to(torch.float64), reference.ntm_scan)
        both = zip(run(single), run(single, reference.ntm_scan), exact, strict=True)
        excess.append([relative(x, z) - 2 * relative(y, z) for x, y, z in both])
    # Where there is next to nothing to round the reference may be exact.
    floor = torch.finfo(torch.float32).eps
    for name, draws in zip(OUTPUTS, zip(*excess, strict=True), strict=True):
        assert statistics.median(draws) <= floor, (name, draws)


@native
@forms
@pytest.mark.parametrize(
    "sample",
    [s for s in SAMPLES if not s.extreme and 0 < s.args[0].numel() <= 300 and s.args[2].numel()],
    ids=lambda s: s.name,
)
def test_gradcheck_and_gradgradcheck(sample: Sample, form: dict[str, Any]):
    if sample.name == "episode_start":
        pytest.skip("a finite difference there is larger than the memory")
    args = [x if x is None or i < 2 else x[:4] for i, x in enumerate(sample.args)]
    args[:9] = [x.detach().clone().requires_grad_() for x in args[:9]]

    def scan(*a):
        return tuple(ops.ntm_scan(*a, **form))

    assert gradcheck(scan, args, fast_mode=True)
    assert gradgradcheck(scan, args, fast_mode=True)


@native
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.args[2].numel()], ids=lambda s: s.name)
def test_opcheck(sample: Sample):
    a = [x if x is None or i == 0 else x.contiguous() for i, x in enumerate(sample.args)]
    utils = ("test_schema", "test_faketensor")
    for every in (1, 2):
        options = (1e-8, 1e-6, every)
        forward = torch.ops.mann_ext.ntm_scan.default
        torch.library.opcheck(forward, (*a, *options, False), test_utils=utils)
        torch.library.opcheck(forward, (*a, *options, True), test_utils=utils)
        reads, _, weights, *history = forward(*a, *options, True)
        torch.library.opcheck(
            torch.ops.mann_ext.ntm_scan_backward.default,
            (torch.ones_like(reads), None, torch.ones_like(weights), *a, *history, *options, True),
            test_utils=utils,
        )


@native
def test_func_grad_vmap_and_jacrev_agree_with_the_reference():
    given = tensors(find("typical"))
    keys = given.pop("keys")

    def loss(k):
        return ops.ntm_scan(keys=k, **given).reads.square().sum()

    def jacobian(k):
        return torch.func.jacrev(lambda q: ops.ntm_scan(keys=q, **given).reads.sum((0, 1)))(k)

    several = torch.stack([keys, keys * 0.5, keys + 1])
    got = torch.func.vmap(torch.func.grad(loss))(several), jacobian(keys)
    with backend("reference"):
        want = torch.stack([torch.func.grad(loss)(k) for k in several]), jacobian(keys)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@native
def test_forward_mode_says_what_to_use():
    given = tensors(find("typical"))
    keys = given.pop("keys")
    with pytest.raises(NotImplementedError, match="jacrev"):
        torch.func.jvp(lambda k: ops.ntm_scan(keys=k, **given).reads, (keys,), (keys,))


@native
def test_compiles_without_a_graph_break_and_exports():
    given = list(find("typical").to(torch.float32).args)
    given[2].requires_grad_()

    class Scan(torch.nn.Module):
        def forward(self, *a):
            return ops.ntm_scan(*a).reads

    expected = Scan()(*given)
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, expected)
    (want,) = torch.autograd.grad(expected.sum(), given[2])
    (got,) = torch.autograd.grad(compiled.sum(), given[2])
    torch.testing.assert_close(got, want)
    program = torch.export.export(Scan(), tuple(given))
    torch.testing.assert_close(program.module()(*given), expected)


def test_autocast_keeps_the_dtype_of_the_memory():
    given = find("typical").to(torch.float32).args
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.ntm_scan(*given)
        narrow = ops.ntm_scan(*given[:2], given[2].bfloat16(), *given[3:])
    assert torch.equal(got.reads, ops.ntm_scan(*given).reads)
    assert narrow.reads.dtype == torch.float32


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_repetition_change_nothing(dtype: torch.dtype):
    sample = _ntm_sample("threads", 4, 5, 150, 12, 3, 2, reset=True).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(sample, snapshot_every=3))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


@native
@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(0, 5),
    batch=st.integers(0, 3),
    slots=st.integers(1, 140),
    width=st.integers(1, 45),
    reads=st.integers(1, 6),
    writes=st.integers(1, 4),
    reset=st.booleans(),
    every=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_any_shape(steps, batch, slots, width, reads, writes, reset, every, seed):
    sample = _ntm_sample(str(seed), steps, batch, slots, width, reads, writes, reset=reset)
    got, want = run(sample, snapshot_every=every), run(sample, reference.ntm_scan)
    for x, y in zip(got, want, strict=True):
        scale = max(float(y.abs().max()), 1.0) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9 * scale)


@native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_of_the_library(isa):
    environment = {**os.environ, "MANN_EXT_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-x", __file__]
    command += ["-k", "native_equals or twice or any_shape or nan or huge or sharp"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


# ---------------------------------------------------------------- promises


@samples
def test_a_scan_is_a_loop_of_single_steps(sample: Sample):
    state: Any = sample.args[:2]
    reads = []
    for t in range(sample.args[2].shape[0]):
        now = (None if x is None else x[t : t + 1] for x in sample.args[2:])
        read, *state = ops.ntm_scan(*state, *now)
        reads.append(read)
    whole = ops.ntm_scan(*sample.args)
    if reads:
        torch.testing.assert_close(torch.cat(reads), whole.reads, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(whole[1:]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_no_gradient_crosses_a_reset_and_nan_does_not_either(name):
    if name == "native" and not _library.native_available():
        pytest.skip("native operators are not built")
    given = tensors(find("typical"))
    given["reset"] = torch.zeros(5, 2, dtype=torch.bool)
    given["reset"][3, 1] = True
    given["keys"][0, 1] = math.nan
    given["keys"].requires_grad_()
    with backend(name):
        out = ops.ntm_scan(**given)
    assert out.reads[:3, 1].isnan().all()
    assert not out.reads[:, 0].isnan().any()
    assert not out.reads[3:].isnan().any()
    given["keys"] = given["keys"].detach().nan_to_num(1.0).requires_grad_()
    with backend(name):
        out = ops.ntm_scan(**given)
    (grad,) = torch.autograd.grad(out.reads[3:].sum(), given["keys"])
    assert (grad[:3, 1] == 0).all()
    assert (grad[:3, 0] != 0).any()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ARGUMENTS[:9])
def test_nan_in_any_input_ends_up_where_the_reference_has_it(name, dtype):
    given = tensors(find("typical").to(dtype))
    where = 1 if name in ("memory", "weights") else given[name].numel() // 2
    given[name].view(-1)[where] = math.nan
    got = ops.ntm_scan(**given)
    want = reference.ntm_scan(**given)
    assert want[0].isnan().any()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-3, atol=1e-3)


@native
def test_what_a_call_leaves_in_memory_does_not_reach_the_next():
    sample = find("reset")
    expected = run(sample, reference.ntm_scan)
    for slots in (1, 19, 64, 200):
        poison = _ntm_sample("poison", 2, 2, slots, 7)
        run(Sample("nan", (*(x * math.nan for x in poison.args[:9]), None)))
        for x, y in zip(run(sample), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9 * float(y.abs().max()))


@native
@pytest.mark.parametrize(
    ("name", "value"), [("strengths", 5000.0), ("sharpenings", 400.0), ("keys", 1e12)]
)
def test_huge_values_stay_finite_in_float32(name, value):
    given = tensors(find("typical").to(torch.float32))
    given[name] = given[name].sign() * value
    given[name].requires_grad_()
    out = ops.ntm_scan(**given)
    assert out.reads.isfinite().all()
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(2, 3))
    (grad,) = torch.autograd.grad(out.reads.sum(), given[name])
    assert grad.isfinite().all()


@native
def test_weights_that_are_exactly_zero_have_the_gradient_of_the_reference():
    """A one-hot weight that only moves: w~ is 0 at all slots but one, and gamma may be 1."""
    for gamma in (1.0, 1.5, 3.0):
        given = tensors(find("episode_start"))
        given["gates"] = torch.zeros_like(given["gates"])
        given["sharpenings"] = torch.full_like(given["sharpenings"], gamma)
        given["shifts"][...] = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)
        sample = Sample("zeros", (*given.values(), None))
        for x, y in zip(run(sample), run(sample, reference.ntm_scan), strict=True):
            scale = max(float(y.abs().max()), 1.0)
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10 * scale)


def test_an_expanded_memory_is_read_where_it_is():
    args = list(find("episode_start").args)
    assert args[0].stride() == (0, 0, 0)
    expected = ops.ntm_scan(args[0].contiguous(), *args[1:])
    torch.testing.assert_close(tuple(ops.ntm_scan(*args)), tuple(expected), rtol=0, atol=0)


@native
@pytest.mark.parametrize(("budget", "count"), [(None, 9), (0, 3)])
def test_the_budget_decides_how_many_memories_are_saved(budget, count):
    memory, _, *_ = args = _ntm_sample("budget", 9).args
    every = module._choose_snapshots(memory, 9, budget)
    snapshots = torch.ops.mann_ext.ntm_scan(*args, 1e-8, 1e-6, every, True)[4]
    assert snapshots.shape == (count, 2, 64 * 6)
    for x, y in zip(run(find("reset"), history_budget=budget), run(find("reset")), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("memory", lambda x: x[0], r"expected memory of shape \(B, N, W\)"),
        ("weights", lambda x: x[:, :2], r"expected weights of shape \(2, 3, 20\)"),
        ("keys", lambda x: x[:, :1], r"expected keys of shape \(T, 2, H, 6\)"),
        ("strengths", lambda x: x[0], "expected strengths of shape"),
        ("gates", lambda x: x[..., :1], "expected gates of shape"),
        ("shifts", lambda x: x[..., :2], r"expected shifts of shape \(5, 2, 3, 3\)"),
        ("sharpenings", lambda x: x[:2], "expected sharpenings of shape"),
        ("erases", lambda x: x[..., :2], "expected erases of shape"),
        ("erases", lambda x: x.expand(5, 2, 3, 6), "at least one .* read head"),
        ("adds", lambda x: x[0], "expected adds of shape"),
        ("keys", lambda x: x.long(), "expected keys of a floating-point dtype"),
        ("memory", lambda x: x.bfloat16(), "memory of dtype float32 or float64"),
        ("adds", lambda x: x.to("meta"), "expected adds on cpu"),
        ("gates", lambda x: None, "expected gates to be a torch.Tensor, got None"),
    ],
)
def test_bad_tensors_get_one_clear_error(name, change, message):
    given = tensors(find("typical"))
    given[name] = change(given[name])
    with pytest.raises((ValueError, TypeError), match=message):
        ops.ntm_scan(**given)


def test_bad_options_and_masks_are_named():
    given = tensors(find("typical"))
    with pytest.raises(ValueError, match="eps"):
        ops.ntm_scan(**given, eps=0.0)
    with pytest.raises(ValueError, match="snapshot_every"):
        ops.ntm_scan(**given, snapshot_every=0)
    with pytest.raises(TypeError, match="reset of dtype bool"):
        ops.ntm_scan(**given, reset=torch.zeros(5, 2))


@native
def test_the_direct_call_of_the_raw_operator_is_checked_too():
    a = list(find("typical").args)
    a[5] = a[5][..., :2].contiguous()
    with pytest.raises(ValueError, match="shifts"):
        torch.ops.mann_ext.ntm_scan(*a, 1e-8, 1e-6, 1, True)


def test_the_docstrings_example_runs():
    assert doctest.testmod(module).failed == 0
