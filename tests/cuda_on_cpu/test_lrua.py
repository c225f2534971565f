"""lrua_scan's CUDA kernels on the CPU: its own tests, and what parallel code can get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mann_ext import ops
from tests import test_lrua
from tests.cuda_on_cpu import emulator
from tests.samples import Sample, _lrua_sample, deferred_lrua_samples, lrua_samples

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]
SAMPLES = {sample.name: sample for sample in lrua_samples()}
FORMS = {name: test_lrua.FORMS[name] for name in ("saved", "rolled_back", "every_3")}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# Writes are deferred where the memory is streamed.
CHUNKS = {name: test_lrua.FORMS[name] for name in ("chunks_of_2", "one_chunk")}
chunks = pytest.mark.parametrize("form", CHUNKS.values(), ids=CHUNKS)


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch):
    """Memories that would fit in shared memory are streamed as well."""
    monkeypatch.setenv("MANN_EXT_CUDA_REGIME", "streaming")


@pytest.fixture(params=["by_size", "cluster", "streaming"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Chosen by size, which is one block for nearly all; shared out between 8; streamed."""
    if request.param != "by_size":
        monkeypatch.setenv("MANN_EXT_CUDA_REGIME", request.param)
    return request.param


# The operator's own tests, unchanged. Of up to four heads, almost all of them are resident.
test_slots = test_lrua.test_native_chooses_the_same_slots_unforced
test_sixteen_bit = test_lrua.test_sixteen_bit_memory_is_rounded_every_step
test_ties = test_lrua.test_ties_go_to_the_lowest_slot
test_nan_usage = test_lrua.test_nan_usage_counts_as_most_used
test_nan_key = test_lrua.test_nan_in_a_key_stays_in_its_batch_element
test_erased = test_lrua.test_erased_slots_receive_no_gradient
test_reset = test_lrua.test_no_gradient_crosses_a_reset
test_sharp = test_lrua.test_sharp_reads_stay_finite
test_steps = test_lrua.test_a_scan_is_a_loop_of_steps
test_any_shape = test_lrua.test_any_shape


@pytest.mark.usefixtures("streaming")
class TestStreaming:
    test_slots = staticmethod(test_lrua.test_native_chooses_the_same_slots_unforced)
    test_sixteen_bit = staticmethod(test_lrua.test_sixteen_bit_memory_is_rounded_every_step)
    test_nan_usage = staticmethod(test_lrua.test_nan_usage_counts_as_most_used)
    test_nan_key = staticmethod(test_lrua.test_nan_in_a_key_stays_in_its_batch_element)
    test_reset = staticmethod(test_lrua.test_no_gradient_crosses_a_reset)
    test_sharp = staticmethod(test_lrua.test_sharp_reads_stay_finite)

    @pytest.mark.parametrize("name", ["paper", "episode_start"])
    def test_float32(self, name: str):
        test_float32(name, "rolled_back")


@forms
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.usefixtures("regime")
def test_float64(sample: Sample, form: dict[str, Any]):
    test_lrua.test_native_equals_the_reference_in_float64(sample, form)


# Every sample once; those with a few slots, which take little time, in every form.
@pytest.mark.parametrize(
    ("name", "form"),
    [(s.name, "rolled_back") for s in SAMPLES.values() if not s.extreme]
    + [(name, form) for name in ("typical", "episode_start") for form in ("saved", "every_3")],
)
def test_float32(name: str, form: str):
    test_lrua.test_float32_error_is_at_most_twice_the_references_own(SAMPLES[name], form)


@pytest.mark.parametrize("name", ["typical", "contents", "reset_shared", "more_heads_than_slots"])
def test_schema_and_shapes(name: str):
    test_lrua.test_opcheck(SAMPLES[name])


OTHER_SHAPES = [
    _lrua_sample("many_heads", 3, 1, 150, 4, 9, contents=True),
    _lrua_sample("most_heads", 2, 1, 70, 12, 64),
    _lrua_sample("wide", 3, 1, 10, 520, 2, contents=True),
    _lrua_sample("wide_and_odd", 3, 1, 5, 203, 3),
    _lrua_sample("wider", 2, 1, 3, 1600, 1),
    _lrua_sample("sharp_and_long", 3, 2, 700, 8, 2, strength=300.0),
    _lrua_sample("sharp_and_many", 3, 1, 300, 4, 6, strength=300.0),
    _lrua_sample("long_reset", 12, 2, 130, 4, 2, reset=True, contents=True),
    _lrua_sample("rows_without_padding", 2, 1, 900, 20, 2),
    _lrua_sample("no_room_for_two_memories", 3, 1, 150, 40, 2),
    _lrua_sample("shared_out", 6, 2, 500, 40, 2, reset=True, contents=True),
]


@forms
@pytest.mark.parametrize("sample", OTHER_SHAPES, ids=lambda s: s.name)
@pytest.mark.usefixtures("regime")
def test_every_split_of_rows_and_heads(sample: Sample, form: dict[str, Any]):
    test_lrua.test_native_equals_the_reference_in_float64(sample, form)


@pytest.mark.parametrize("name", ["typical", "reset_shared", "tile_and_one", "eight_heads"])
@pytest.mark.usefixtures("regime")
def test_no_order_of_threads_changes_a_bit(name: str, cuda_on_cpu):
    for form in FORMS.values():
        check_order_of_threads(SAMPLES[name], form, cuda_on_cpu)


def check_order_of_threads(sample: Sample, form: dict[str, Any], cuda_on_cpu) -> None:
    results = []
    for seed in range(3):
        cuda_on_cpu.cuda_on_cpu_set_seed(seed)
        output, grads = test_lrua.run(sample.to(torch.float32), **form)
        results.append((*output, *grads))
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 40])
@pytest.mark.usefixtures("streaming")
def test_any_number_of_multiprocessors(multiprocessors: int, cuda_on_cpu):
    cuda_on_cpu.cuda_on_cpu_set_multiprocessors(multiprocessors)
    sample = _lrua_sample("blocks", 3, 2, 1000, 8, 2)
    test_lrua.test_native_equals_the_reference_in_float64(sample, FORMS["rolled_back"])


@pytest.mark.usefixtures("regime")
def test_rows_that_are_not_aligned():
    sample = _lrua_sample("aligned", 3, 2, 70, 8, 2).to(torch.float32)
    memory, weights, usage, keys, *rest = sample.args
    want = test_lrua.run(sample, snapshot_every=0)
    for moved in (0, 3):
        args = [memory, weights, usage, keys, *rest]
        shifted = torch.empty(args[moved].numel() + 1)[1:].view(args[moved].shape)
        args[moved] = shifted.copy_(args[moved])
        assert args[moved].data_ptr() % 16 != 0
        output = ops.lrua_scan(*args, snapshot_every=0)
        for got, expected in zip(output, want[0], strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("regime")
def test_an_expanded_memory_is_read_where_it_is():
    sample = _lrua_sample("expanded", 3, 2, 70, 8, 2, constant=True)
    assert sample.args[0].stride() == (0, 0, 0)
    test_lrua.test_native_equals_the_reference_in_float64(sample, FORMS["rolled_back"])


@pytest.mark.usefixtures("streaming")
class TestDeferredWrites:
    @chunks
    @pytest.mark.parametrize(
        "sample", [*SAMPLES.values(), *OTHER_SHAPES, *deferred_lrua_samples()], ids=lambda s: s.name
    )
    def test_float64(self, sample: Sample, form: dict[str, Any]):
        test_lrua.test_native_equals_the_reference_in_float64(sample, form)

    @pytest.mark.parametrize("form", CHUNKS)
    @pytest.mark.parametrize("name", test_lrua.DEFERRED)
    def test_float32(self, name: str, form: str):
        test_lrua.test_float32_error_of_deferred_writes_is_at_most_twice_too(name, form)

    @pytest.mark.parametrize("chunk", range(2, 13))
    def test_every_length(self, chunk: int):
        sample, form = deferred_lrua_samples()[0], {"snapshot_every": 0, "chunk": chunk}
        test_lrua.test_native_equals_the_reference_in_float64(sample, form)

    @pytest.mark.parametrize("multiprocessors", [1, 7, 40])
    def test_any_number_of_multiprocessors(self, multiprocessors: int, cuda_on_cpu):
        cuda_on_cpu.cuda_on_cpu_set_multiprocessors(multiprocessors)
        sample = _lrua_sample("blocks", 3, 2, 1000, 8, 2)
        test_lrua.test_native_equals_the_reference_in_float64(sample, CHUNKS["one_chunk"])

    def test_an_expanded_memory_is_read_where_it_is(self):
        sample = _lrua_sample("expanded", 3, 2, 70, 8, 2, constant=True)
        assert sample.args[0].stride() == (0, 0, 0)
        test_lrua.test_native_equals_the_reference_in_float64(sample, CHUNKS["chunks_of_2"])

    @pytest.mark.parametrize("name", ["typical", "reset_shared", "tile_and_one", "eight_heads"])
    def test_no_order_of_threads_changes_a_bit(self, name: str, cuda_on_cpu):
        check_order_of_threads(SAMPLES[name], CHUNKS["chunks_of_2"], cuda_on_cpu)

    def test_nothing_is_saved_where_no_gradient_is_wanted(self):
        sample = SAMPLES["reset"]
        want = test_lrua.run_reference(sample)[0]
        with torch.no_grad():
            output = ops.lrua_scan(*sample.args, chunk=4, **sample.options)
        for got, expected in zip(output, want[:4], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("chunk", [2, 3, 32])
    def test_number_of_launches(self, chunk: int, cuda_on_cpu):
        """Two a step, two a chunk, two at the end and one at the beginning."""
        args = SAMPLES["typical"].args
        steps = args[3].shape[0]
        before = cuda_on_cpu.cuda_on_cpu_launches()
        ops.lrua_scan(*args, snapshot_every=0, chunk=chunk)
        forward = 2 * steps + 2 * -(-steps // chunk) + 3
        assert cuda_on_cpu.cuda_on_cpu_launches() - before == forward

    @pytest.mark.parametrize(
        ("sample", "form"),
        [
            (SAMPLES["typical"].to(torch.bfloat16), {"snapshot_every": 0}),
            (SAMPLES["typical"], {"snapshot_every": 3}),
            (_lrua_sample("narrow", width=3), {"snapshot_every": 0}),
        ],
        ids=["sixteen_bit", "snapshots", "narrow"],
    )
    def test_not_deferred(self, sample: Sample, form: dict[str, Any], cuda_on_cpu):
        args = [x.clone().requires_grad_() if i == 3 else x for i, x in enumerate(sample.args)]
        before = cuda_on_cpu.cuda_on_cpu_launches()
        ops.lrua_scan(*args, chunk=2, **form)
        assert cuda_on_cpu.cuda_on_cpu_launches() - before == 2 * args[3].shape[0] + 1

    def test_deferred_unasked_where_it_moves_fewer_bytes(self, cuda_on_cpu):
        sample = _lrua_sample("large", 2, 1, 2**15, 128, 1, constant=True).to(torch.float32)
        before = cuda_on_cpu.cuda_on_cpu_launches()
        ops.lrua_scan(*sample.args)
        assert cuda_on_cpu.cuda_on_cpu_launches() - before == 2 * 2 + 2 + 3


def test_number_of_launches(regime: str, cuda_on_cpu):
    """Resident: one. Streaming: two a step forward and one backward."""
    steps = SAMPLES["typical"].args[3].shape[0]
    keys = SAMPLES["typical"].args[3].clone().requires_grad_()
    args = [keys if i == 3 else x for i, x in enumerate(SAMPLES["typical"].args)]
    before = cuda_on_cpu.cuda_on_cpu_launches()
    reads = ops.lrua_scan(*args, snapshot_every=0).reads
    forward, backward = (2 * steps + 1, steps + 2) if regime == "streaming" else (1, 1)
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == forward
    reads.sum().backward()
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == forward + backward


@pytest.mark.parametrize(("slots", "blocks"), [(300, 1), (900, 2), (1900, 4), (3600, 8)])
def test_as_many_blocks_as_a_memory_needs(slots: int, blocks: int, cuda_on_cpu):
    sample = _lrua_sample("cluster", 2, 1, slots, 40, 2, reset=True)
    want = test_lrua.run_reference(sample)[0]
    before = cuda_on_cpu.cuda_on_cpu_launches()
    with torch.no_grad():
        output = ops.lrua_scan(*sample.args, **sample.options)
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == 1
    assert cuda_on_cpu.cuda_on_cpu_cluster() == blocks
    for got, expected in zip(output, want[:4], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_rows_that_do_not_fit_in_shared_memory_are_an_error():
    sample = _lrua_sample("widest", 1, 1, 1, 20000, 1)
    with pytest.raises(ValueError, match="rows of 20000 columns and 1 heads do not fit"):
        ops.lrua_scan(*sample.args)
