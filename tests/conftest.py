"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The trained checkpoint that the repository ships."""
    return ROOT / "models" / "digits.pt"


# The same examples in every run: whether a change passes must not hang on the draw. Fuzzing proper is a benchmark.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

# Tests keep all cores busy, and small operations then lose most of their time to threads that wait for each other, in
# the processes that tests start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
