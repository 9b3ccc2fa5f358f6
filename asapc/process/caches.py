"""The user's cache folder, in which several runs write at once."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_folder(name: str) -> Path:
    """Return a folder of asapc's in the user's cache, which need not exist."""
    return Path(platformdirs.user_cache_path("asapc", appauthor=False)) / name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write, which then takes the place of `path`; other runs may do the same.

    Raises:
        OSError: it cannot be written. `path` is as it was then.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
