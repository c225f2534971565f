"""Fixtures of the tests that run CUDA kernels on the CPU."""

from __future__ import annotations

import pytest

from tests.cuda_on_cpu import emulator


@pytest.fixture
def cuda_on_cpu():
    """The native operators are the emulated CUDA kernels while a test runs."""
    with emulator.cuda_on_cpu() as library:
        yield library


@pytest.fixture(params=["by_size", "streaming"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Streaming: what would fit in shared memory lies in global memory as well."""
    if request.param != "by_size":
        monkeypatch.setenv("MANN_EXT_CUDA_REGIME", request.param)
    return request.param
