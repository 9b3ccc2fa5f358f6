"""Fixtures of the tests of the command."""

from pathlib import Path

import pytest
import torch
from helpers.command import write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Threads that compete with other processes for the cores wait for each other most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "small.pt")
