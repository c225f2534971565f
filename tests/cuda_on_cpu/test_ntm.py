"""ntm_scan's CUDA kernels on the CPU: its own tests, and what parallel code can get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mann_ext import ops
from tests import test_ntm
from tests.cuda_on_cpu import emulator
from tests.samples import Sample, _ntm_sample, ntm_samples

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]
SAMPLES = {sample.name: sample for sample in ntm_samples()}

# The operator's own tests, unchanged.
test_float32 = test_ntm.test_float32_error_is_at_most_twice_the_references_own
test_nan = test_ntm.test_nan_in_any_input_ends_up_where_the_reference_has_it
test_reset = test_ntm.test_no_gradient_crosses_a_reset_and_nan_does_not_either
test_huge = test_ntm.test_huge_values_stay_finite_in_float32
test_zero_weights = test_ntm.test_weights_that_are_exactly_zero_have_the_gradient_of_the_reference
test_steps = test_ntm.test_a_scan_is_a_loop_of_single_steps
test_expanded = test_ntm.test_an_expanded_memory_is_read_where_it_is
test_any_shape = test_ntm.test_any_shape


@test_ntm.forms
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.usefixtures("regime")
def test_float64(sample: Sample, form: dict[str, Any]):
    test_ntm.test_native_equals_the_reference_in_float64(sample, form)


@pytest.mark.parametrize(
    "sample",
    [
        _ntm_sample("most_heads", 2, 1, 70, 12, 60, 4),
        _ntm_sample("wide", 2, 1, 5, 520, 2, 2),
        _ntm_sample("long_reset", 12, 2, 130, 4, 2, reset=True),
        _ntm_sample("more_than_fits", 2, 1, 1500, 20, 2),
    ],
    ids=lambda s: s.name,
)
def test_other_shapes(sample: Sample):
    test_ntm.test_native_equals_the_reference_in_float64(sample, {"snapshot_every": 5})


@pytest.mark.parametrize("name", ["typical", "several_write_heads"])
def test_schema_and_shapes(name: str):
    test_ntm.test_opcheck(SAMPLES[name])


@pytest.mark.parametrize("name", ["reset", "several_write_heads", "tile_and_one"])
@pytest.mark.usefixtures("regime")
def test_no_order_of_threads_changes_a_bit(name: str, cuda_on_cpu):
    sample = SAMPLES[name].to(torch.float32)
    results = []
    for seed, every in ((0, 1), (1, 1), (2, 1), (3, 3)):
        cuda_on_cpu.cuda_on_cpu_set_seed(seed)
        results.append(test_ntm.run(sample, snapshot_every=every))
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("regime")
def test_one_launch_forward_and_one_backward(cuda_on_cpu):
    args = list(SAMPLES["typical"].args)
    args[2] = args[2].clone().requires_grad_()
    before = cuda_on_cpu.cuda_on_cpu_launches()
    reads = ops.ntm_scan(*args).reads
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == 1
    reads.sum().backward()
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == 2
