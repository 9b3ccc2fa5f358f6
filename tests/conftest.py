"""Fixtures that several test files share."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The trained checkpoint that the repository ships."""
    return ROOT / "models" / "digits.pt"


# Small operations on a busy machine lose most of their time to threads that wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
