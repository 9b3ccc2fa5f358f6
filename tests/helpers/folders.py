"""Tampers with folders that `asapc compile` wrote, so that sizes and hashes still fit."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Places of a report or manifest are replaced by these; each has another type than most places want.
ODD_VALUES: tuple[Any, ...] = (None, -1, 10**9, 2**70, 0.5, "x", "../..", [], {}, True)


def tamper(folder: Path, target: Path, name: str, change: Callable[[Any], object]) -> Path:
    """Copy a folder, change the JSON of one file in it, and make the manifest fit."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    changed = change(content)
    (target / name).write_text(json.dumps(content if changed is None else changed))
    if name != "manifest.json":
        relist(target)
    return target


def relist(folder: Path) -> None:
    """Make a manifest list what is in its folder, with the model that it names."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file != path and file.is_file()}
    manifest["files"] = {
        n: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for n, data in files.items()
    }
    path.write_text(json.dumps(manifest))
