"""The emulator itself: it runs what CUDA would run, and refuses what CUDA would get wrong."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda_on_cpu import emulator

pytestmark = emulator.needs_compiler


@pytest.fixture(scope="module")
def library():
    path = emulator.compile_library(
        [emulator.HERE / "emulator_test.cu"], emulator.BUILD / "test", "libemulator_test.so"
    )
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.cuda_on_cpu_set_seed.argtypes = [ctypes.c_uint64]
    return library


@pytest.fixture
def run(library):
    def call(which: int, seed: int = 0, numbers: torch.Tensor | None = None) -> torch.Tensor:
        library.cuda_on_cpu_set_seed(seed)
        numbers = torch.zeros(1) if numbers is None else numbers
        return torch.ops.mann_ext_emulator_test.run(which, numbers)

    return call


@pytest.mark.parametrize("seed", range(4))
def test_barriers_shuffles_votes_and_atomics(run, seed):
    out = run(0, seed, torch.arange(1000, dtype=torch.float32))
    assert out[0] == 999 * 500
    assert out[1] == 15


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_a_cooperative_grid_meet_at_a_barrier(run, seed):
    assert run(1, seed)[:4].tolist() == [6, 106, 206, 306]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_a_cluster_see_each_others_shared_memory(run, seed):
    expected = torch.arange(64.0).reshape(2, 2, 16).flip(1).flatten()
    torch.testing.assert_close(run(2, seed), expected)


@pytest.mark.parametrize("which", [3, 4])
def test_a_missing_barrier_shows_as_nan_under_some_seed(run, which):
    assert any(run(which, seed).isnan().any() for seed in range(3))


def test_shared_memory_starts_as_nan(run):
    assert run(5).isnan().all()


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (6, "wrote past its 256 bytes of dynamic shared memory; kernel: .*out_of_bounds"),
        (7, "63 of 64 threads wait at a barrier .* kernel: .*divergent_barrier"),
        (8, "lanes 3fffffff of warp . wait in a warp function .* kernel: .*divergent_shuffle"),
        (9, "a shuffle reads from a lane that takes no part"),
        (11, "a block must have 1 to 1024 threads"),
        (12, "227 KB"),
    ],
)
def test_wrong_kernels_are_errors(run, which, message):
    with pytest.raises(RuntimeError, match=message):
        run(which)


def test_the_order_of_blocks_depends_on_the_seed(run):
    assert len({run(10, seed)[0].item() for seed in range(8)}) > 2
    assert run(10, 3)[0] == run(10, 3)[0]
