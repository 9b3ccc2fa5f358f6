"""A compiled folder to package."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(point_model) -> Path:
    """A small model on sets of points, compiled for 8 to 48 of them and batches of up to 16."""
    _, compile_it = point_model
    return compile_it(dynamic="batch=1:16,seq=8:48", target="onnx").folder
