"""lstm_lrua_scan's CUDA kernels on the CPU: its own tests, and what parallel code can get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mann_ext import ops
from tests import test_lstm_lrua
from tests.cuda_on_cpu import emulator
from tests.samples import Sample, _lstm_lrua_sample, lstm_lrua_samples

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]
SAMPLES = {sample.name: sample for sample in lstm_lrua_samples()}
forms = pytest.mark.parametrize(
    "form", test_lstm_lrua.FORMS.values(), ids=list(test_lstm_lrua.FORMS)
)

# The operator's own tests, unchanged.
test_slots = test_lstm_lrua.test_native_chooses_the_same_slots_unforced
test_sixteen_bit = test_lstm_lrua.test_sixteen_bit_memory_is_rounded_every_step
test_nothing_saved = test_lstm_lrua.test_nothing_is_saved_without_gradients
test_one_output = test_lstm_lrua.test_the_gradient_of_one_output_alone
test_pieces = test_lstm_lrua.test_pieces_with_the_state_carried_equal_the_whole
test_reset = test_lstm_lrua.test_a_reset_forgets_everything_even_nan
test_autocast = test_lstm_lrua.test_autocast_keeps_the_sums_in_float32
test_model = test_lstm_lrua.test_the_model_equals_its_loop_of_steps


@forms
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.usefixtures("regime")
def test_float64(sample: Sample, form: dict[str, Any]):
    test_lstm_lrua.test_native_equals_the_reference_in_float64(sample, form)


# Every sample once; those with a few slots, which take little time, in every form.
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "rolled_back") for name in SAMPLES]
    + [(name, form) for name in ("typical", "episode_start") for form in ("saved", "every_3")],
)
def test_float32(name: str, form: str):
    test_lstm_lrua.test_float32_error_is_at_most_twice_the_references_own(SAMPLES[name], form)


@pytest.mark.parametrize("name", ["typical", "everything", "one_of_each"])
def test_schema_and_shapes(name: str):
    test_lstm_lrua.test_opcheck(SAMPLES[name], 1)


OTHER_SHAPES = [
    _lstm_lrua_sample("long_reset", 12, 2, 130, 4, 2, reset=True, write_content=True),
    _lstm_lrua_sample("many_units", 2, 9, 30, 5, 2, 3, 70, strength_per_step=True),
    _lstm_lrua_sample("many_heads", 2, 1, 150, 4, 9, write_content=True),
    _lstm_lrua_sample("wide", 2, 1, 10, 520, 2, 3, 5),
    _lstm_lrua_sample("sharp", 3, 2, 300, 8, 2, strength=300.0),
    _lstm_lrua_sample("very_strong", 3, 2, 30, 8, 2, strength_per_step=True, seed=1),
]


@forms
@pytest.mark.parametrize("sample", OTHER_SHAPES, ids=lambda s: s.name)
@pytest.mark.usefixtures("regime")
def test_every_split_of_rows_units_and_heads(sample: Sample, form: dict[str, Any]):
    if sample.name == "very_strong":  # the softplus of more than 20 is its argument
        sample.args[12][-sample.args[3].shape[1] :] = torch.tensor([19.999, 30.0])
    test_lstm_lrua.test_native_equals_the_reference_in_float64(sample, form)


@pytest.mark.parametrize("name", ["typical", "everything", "eight_heads", "odd_sizes"])
@pytest.mark.usefixtures("regime")
def test_no_order_of_threads_changes_a_bit(name: str, cuda_on_cpu):
    sample = SAMPLES[name].to(torch.float32)
    for form in test_lstm_lrua.FORMS.values():
        results = []
        for seed in range(3):
            cuda_on_cpu.cuda_on_cpu_set_seed(seed)
            results.append(test_lstm_lrua.run(sample, **form))
        for result in results[1:]:
            for x, y in zip(result, results[0], strict=True):
                assert torch.equal(x, y)


def test_number_of_launches(regime: str, cuda_on_cpu):
    """Forward three a step, or four streaming; backward four, and the first and last of all."""
    sample = SAMPLES["typical"]
    steps, args = sample.args[0].shape[0], test_lstm_lrua.learnt(sample)
    before = cuda_on_cpu.cuda_on_cpu_launches()
    reads = ops.lstm_lrua_scan(*args).reads
    forward = 4 * steps + 1 if regime == "streaming" else 3 * steps
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == forward
    reads.sum().backward()
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == forward + 4 * steps + 2
