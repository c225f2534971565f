"""lstm_scan's CUDA kernels on the CPU: its own tests, and what parallel code can get wrong."""

from __future__ import annotations

import pytest
import torch

from mann_ext.ops import lstm_scan
from tests import test_lstm
from tests.cuda_on_cpu import emulator
from tests.test_lstm import check, dtypes, inputs, resets, run

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]

# The operator's own tests, unchanged.
test_lstm_of_pytorch = test_lstm.test_it_equals_the_lstm_of_pytorch
test_derivatives = test_lstm.test_first_and_second_derivatives
test_second_derivative = test_lstm.test_second_derivative_of_part_of_the_outputs_and_inputs
test_schema_and_shapes = test_lstm.test_opcheck
test_no_gradient_of_x = test_lstm.test_an_input_without_gradient_gets_none_computed
test_pieces = test_lstm.test_pieces_with_the_state_carried_equal_the_whole
test_reset = test_lstm.test_a_reset_forgets_everything_even_nan
test_huge = test_lstm.test_huge_gates_saturate
test_nan_and_infinity = test_lstm.test_nan_and_infinity_end_up_where_the_loop_has_them
test_small_gates = test_lstm.test_small_gates_keep_their_digits
test_strides = test_lstm.test_inputs_of_any_strides_and_expanded_gradients
test_raw_operator = test_lstm.test_the_direct_call_of_the_raw_operator_is_checked_too
test_controller = test_lstm.test_the_controller_fused_and_looped_agree


@pytest.fixture(params=["by_size", "streaming", "cluster", "block"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Of MANN_EXT_CUDA_REGIME; by size, as many blocks as needed."""
    if request.param != "by_size":
        monkeypatch.setenv("MANN_EXT_CUDA_REGIME", request.param)
    return request.param


# Every number of blocks and of runs of a lane, with units that do not divide evenly; 257 units do
# not fit in float32, nor 129 in float64. One multiprocessor of three takes several elements.
SIZES = [
    (3, 2, 3, 1), (2, 3, 5, 16), (3, 1, 4, 31), (2, 4, 3, 33), (2, 5, 70, 64), (2, 3, 2, 65),
    (2, 2, 3, 127), (2, 2, 3, 130), (2, 3, 5, 200), (1, 2, 3, 209), (2, 1, 2, 256), (2, 1, 3, 257),
    (1, 1, 1, 1), (0, 2, 3, 4), (2, 0, 3, 4), (0, 0, 2, 40),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("way")
def test_values_and_gradients(sizes: tuple[int, int, int, int], reset: bool, dtype: torch.dtype):
    check(inputs(*sizes, dtype=dtype), resets(*sizes[:2]) if reset else None)


@dtypes
@pytest.mark.parametrize("hidden", [5, 40])
def test_more_elements_than_a_cluster_takes_at_once(hidden: int, dtype: torch.dtype, cuda_on_cpu):
    cuda_on_cpu.cuda_on_cpu_set_multiprocessors(1)
    check(inputs(2, 70, 3, hidden, dtype), resets(2, 70))


@pytest.mark.parametrize("hidden", [6, 45])
@pytest.mark.usefixtures("way")
def test_no_order_of_threads_changes_a_bit(hidden: int, cuda_on_cpu):
    tensors, reset = inputs(4, 5, 3, hidden, torch.float32), resets(4, 5)
    results = []
    for seed in range(3):
        cuda_on_cpu.cuda_on_cpu_set_seed(seed)
        results.append(run(lstm_scan, tensors, reset))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("hidden", [20, 200, 300])
def test_number_of_launches(hidden: int, cuda_on_cpu):
    """Resident: one forward and two backward, one of which gathers h; streaming: for each step."""
    tensors = [tensor.requires_grad_() for tensor in inputs(5, 2, 3, hidden, torch.float32)]
    before = cuda_on_cpu.cuda_on_cpu_launches()
    output = lstm_scan(*tensors)
    forward = cuda_on_cpu.cuda_on_cpu_launches() - before
    output.hidden.sum().backward()
    assert (forward, cuda_on_cpu.cuda_on_cpu_launches() - before - forward) == (
        (1, 2) if hidden <= 256 else (5, 11)
    )
