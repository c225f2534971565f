"""lrua_scan's CUDA kernels on the CPU: its own tests, and what parallel code can get wrong."""

from __future__ import annotations

import pytest

from tests import test_lrua
from tests.cuda_on_cpu import emulator

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]

# The operator's own tests, unchanged.
test_float64 = test_lrua.test_native_equals_the_reference_in_float64
test_slots = test_lrua.test_native_chooses_the_same_slots_unforced
