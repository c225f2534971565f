"""What nvcc says of each kernel in the log that the build keeps: nothing may go to local memory."""

from __future__ import annotations

import re

import pytest

from tests.cuda_on_cpu.emulator import ROOT

SOURCES = [
    path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if "__global__" in path.read_text()
]
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)


def log_of(source):
    log = ROOT / "build/native/cuda" / f"{source.name}.o.log"
    if not log.is_file() or log.stat().st_mtime < source.stat().st_mtime:
        pytest.skip(f"{source.name} was not compiled here: MANN_EXT_CUDA=1 make build")
    return log.read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_kernel_spills_registers_or_has_a_stack(source):
    kernels = list(KERNEL.finditer(log_of(source)))
    assert {"sm_80", "sm_90"} <= {kernel["arch"] for kernel in kernels}
    spilling = [
        f"{kernel['name']} for {kernel['arch']}"
        for kernel in kernels
        if (kernel["stack"], kernel["stores"], kernel["loads"]) != ("0", "0", "0")
    ]
    assert not spilling
