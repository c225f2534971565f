"""Blocks of large tensors on the CPU serve the next tensor of their size, and are not hoarded."""

import gc
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mann_ext import _library, ops

pytestmark = pytest.mark.skipif(
    not _library.native_available(), reason="the operators are not built"
)
SLOTS = 65_536
MIB = 2**20
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux's")


def memory_after_a_step(mebibytes: int, value: float = 0.5, steps: int = 1) -> torch.Tensor:
    """A tensor of that size from the operator, all rows zero but those written to."""
    width = mebibytes * MIB // SLOTS // 4
    return ops.lrua_scan(
        torch.zeros(1, 1, 1).expand(1, SLOTS, width),
        torch.zeros(1, 1, SLOTS),
        torch.zeros(1, SLOTS),
        torch.full((steps, 1, 1, width), value),
        torch.zeros(steps, 1, 1),
    ).memory


def resident() -> int:
    """Bytes of this process in RAM."""
    return _memory()[1]


def addressed() -> int:
    """Bytes of this process's address space."""
    return _memory()[0]


def _memory() -> list[int]:
    return [int(pages) * 4096 for pages in Path("/proc/self/statm").read_text().split()]


def test_a_freed_block_serves_the_next_tensor_of_its_size() -> None:
    first = memory_after_a_step(16)
    kept = first.data_ptr()
    assert kept % (2 * MIB) == 0
    other = memory_after_a_step(16)
    assert other.data_ptr() != kept
    del first
    assert memory_after_a_step(32).data_ptr() != kept
    again = memory_after_a_step(16, value=3.0)
    assert again.data_ptr() == kept
    assert again.sum() == 3 * again.shape[-1]
    assert (again[:, 1:] == 0).all()  # nothing of the first
    assert other.sum() == 0.5 * other.shape[-1]


def test_such_a_tensor_is_like_any_other() -> None:
    memory = memory_after_a_step(16)
    view = memory[0, 0]
    copy = pickle.loads(pickle.dumps(memory))
    del memory
    gc.collect()
    memory_after_a_step(16, value=7.0)
    assert (view == 0.5).all()  # a view keeps its block
    assert torch.equal(copy[0, 0], view)
    view += 1
    assert view.unsqueeze(0).mm(view.unsqueeze(1)) == 1.5**2 * len(view)


def test_too_much_is_one_clear_error() -> None:
    with pytest.raises(
        RuntimeError, match=r"no memory for a tensor .* 16777216 MiB; use fewer slots"
    ):
        memory_after_a_step(2**24)


@ON_LINUX
def test_little_is_kept() -> None:
    memory_after_a_step(64)
    before = resident()
    held = [memory_after_a_step(64) for _ in range(8)]
    assert resident() - before > 400 * MIB
    del held
    gc.collect()
    assert resident() - before < 280 * MIB


def with_limited_memory(before: str, more: int, after: str) -> None:
    """Runs both in a new process, and the second with so many MiB more than are in use by then."""
    script = f"""
import resource
import torch
from tests.test_blocks import *
torch.set_num_threads(1)
{before}
resource.setrlimit(resource.RLIMIT_AS, (addressed() + {more} * MIB,) * 2)
{after}
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@ON_LINUX
def test_what_is_kept_is_given_back_before_memory_runs_out() -> None:
    with_limited_memory(
        "memory_after_a_step(128)", 50,
        "assert memory_after_a_step(144).sum() == 0.5 * 144 * MIB // SLOTS // 4",
    )  # fmt: skip


@ON_LINUX
def test_too_little_to_work_in_is_one_clear_error() -> None:
    with_limited_memory(
        "memory_after_a_step(4)", 150, """
with pytest.raises(RuntimeError, match=r"no memory for 1\\d\\d MiB to work in; use fewer"):
    memory_after_a_step(128, steps=2)
""",
    )  # fmt: skip
