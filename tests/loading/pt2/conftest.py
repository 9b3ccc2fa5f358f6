"""An archive of torch.export that several test files read."""

from pathlib import Path

import pytest
from helpers.hostile import export


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("archive") / "tiny.pt2")
