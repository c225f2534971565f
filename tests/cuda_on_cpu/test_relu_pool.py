"""relu_pool's CUDA kernels on the CPU: its own tests."""

from __future__ import annotations

import pytest

from tests import test_relu_pool
from tests.cuda_on_cpu import emulator

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]

test_values_and_gradients = test_relu_pool.test_values_and_gradients_are_exactly_the_reference_s
test_nan_and_infinity = test_relu_pool.test_nan_and_infinity_stay_what_they_are
test_non_contiguous = test_relu_pool.test_non_contiguous_inputs
test_derivatives = test_relu_pool.test_first_and_second_derivatives
test_schema_and_shapes = test_relu_pool.test_opcheck
