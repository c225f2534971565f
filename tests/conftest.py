"""Settings shared by all tests: where the data is, seeds, and how hypothesis searches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Real data is used where it lies beside the project; tests that need it skip where it does not.
DATA = Path(__file__).resolve().parents[1] / "../shared/data"
if DATA.is_dir():
    os.environ.setdefault("MANN_EXT_DATA", str(DATA.resolve()))

# The same examples in every run: a red test is red again when it is run again.
settings.register_profile("mann_ext", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("mann_ext")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
