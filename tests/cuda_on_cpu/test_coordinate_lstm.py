"""coordinate_lstm's CUDA kernels on the CPU: its own tests, and what parallel code can break."""

from __future__ import annotations

import pytest
import torch

from mann_ext import reference
from mann_ext.ops import coordinate_lstm
from tests import test_coordinate_lstm
from tests.cuda_on_cpu import emulator
from tests.test_coordinate_lstm import inputs, run

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]

# The operator's own tests, unchanged.
test_float32 = test_coordinate_lstm.test_float32_is_as_exact_as_the_reference_in_float32
test_derivatives = test_coordinate_lstm.test_first_and_second_derivatives_by_weights
test_lstm = test_coordinate_lstm.test_it_is_an_lstm_and_a_linear_layer
test_empty = test_coordinate_lstm.test_no_coordinates_and_no_steps
test_schema_and_shapes = test_coordinate_lstm.test_opcheck

# Around the tiles of 32 coordinates (float64) and the 5 units of a warp, 20 of a block; 20 is the
# number that the compiler knows, and 60 units take two passes over more pieces than threads.
SIZES = [
    (1, 1, 1), (1, 33, 20), (2, 1, 20), (2, 32, 20), (2, 31, 4), (3, 70, 5), (2, 65, 6),
    (2, 40, 21), (3, 35, 60), (2, 3, 130),
]  # fmt: skip


@pytest.mark.parametrize("size", [*test_coordinate_lstm.SIZES, *SIZES], ids=str)
@pytest.mark.usefixtures("regime")
def test_float64(size: tuple[int, int, int]):
    test_coordinate_lstm.test_float64_is_the_reference(size)


@pytest.mark.parametrize("size", [(2, 63, 20), (3, 65, 20), (2, 129, 7)], ids=str)
@pytest.mark.usefixtures("regime")
def test_float32_around_its_tiles(size: tuple[int, int, int]):
    test_coordinate_lstm.test_float32_is_as_exact_as_the_reference_in_float32(size)


@pytest.mark.parametrize("steps", [2, 3])  # h_T lies in one or the other half of the room
@pytest.mark.parametrize("hidden", [20, 7])
def test_a_block_that_works_on_many_tiles(hidden: int, steps: int, cuda_on_cpu):
    """With one multiprocessor, blocks take several tiles and some of them one more."""
    cuda_on_cpu.cuda_on_cpu_set_multiprocessors(1)
    test_coordinate_lstm.test_float64_is_the_reference((steps, 32 * 50 + 5, hidden))


@pytest.mark.parametrize("hidden", [20, 9])
@pytest.mark.usefixtures("regime")
def test_no_order_of_threads_changes_a_bit(hidden: int, cuda_on_cpu):
    tensors = inputs(3, 300, hidden, torch.float32)
    results = []
    for seed in range(3):
        cuda_on_cpu.cuda_on_cpu_set_seed(seed)
        results.append(run(coordinate_lstm, tensors))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_one_launch_forward_and_two_backward(cuda_on_cpu):
    gradients, *weights = inputs(3, 100, 20)
    for weight in weights:
        weight.requires_grad_()
    before = cuda_on_cpu.cuda_on_cpu_launches()
    out = coordinate_lstm(gradients, *weights)
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == 1
    out.sum().backward()
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == 3


@pytest.mark.parametrize("hidden", [20, 6])
def test_nan_stays_in_its_coordinate(hidden: int):
    gradients, *weights = inputs(4, 200, hidden)
    gradients[1, 77] = float("nan")
    made = coordinate_lstm(gradients, *weights)
    expected = reference.coordinate_lstm(gradients, *weights)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert made.isnan().nonzero().tolist() == [[77]]
