"""Reads the manifest of a folder that `asapc compile` wrote, and holds its files to it; without torch."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asapc.errors import AsapcError, CheckpointError
from asapc.loading.schemas import departure, read_schema
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.texts import read_json

MANIFEST, MODEL, HALF = "manifest.json", "model.onnx", "model.float16.onnx"
COMPILE = "compile the model again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Check the files of a folder, and return its manifest.

    It holds regular files alone, just those that its manifest lists, with their sizes and hashes.

    Raises:
        CheckpointError: one of these does not hold; the message names the file.
    """
    names = list_files(folder)
    manifest = read_checked(folder / MANIFEST)
    check_files(folder, names, manifest["files"])
    return manifest


def list_files(folder: Path) -> set[str]:
    """Return the names of a folder's files, all of which are regular; links are not."""
    try:
        entries = sorted(folder.iterdir())
    except (OSError, ValueError):
        if not os.path.lexists(folder):
            raise CheckpointError(f"cannot read {folder}: no such folder", "check the path") from None
        raise CheckpointError(f"{folder} was not written by `asapc compile`", COMPILE) from None
    names = {entry.name for entry in entries}
    if MANIFEST not in names:
        raise CheckpointError(f"{folder} was not written by `asapc compile`, or is incomplete", COMPILE)
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            raise refusal(entry, "it is not a regular file")
    return names


def check_files(folder: Path, names: set[str], files: Mapping[str, Any]) -> None:
    """Refuse files that are missing, not listed or changed; sizes are compared first, since hashes take time."""
    for name in sorted(files.keys() - names):
        raise refusal(folder / name, "it is missing")
    for name in sorted(names - files.keys() - {MANIFEST}):
        raise CheckpointError(f"cannot read {folder}: {MANIFEST} does not list its {name}", "remove it there")
    for name, facts in files.items():
        if size_of(folder / name) != facts["bytes"]:
            raise refusal(folder / name, "it changed since it was written")
    for name, facts in files.items():
        if Source.at(folder / name, CheckpointError).sha256 != facts["sha256"]:
            raise refusal(folder / name, "it changed since it was written")


def size_of(path: Path) -> int:
    """Return the size of a file that was there a moment ago: another run may be replacing its folder."""
    try:
        return path.stat().st_size
    except OSError:
        raise refusal(path, "it is missing") from None


def read_checked(path: Path) -> dict[str, Any]:
    """Read a manifest or report that keeps to its schema."""
    content: Any = read_json(Source.at(path, CheckpointError), COMPILE)
    check_version(path, content)
    if (why := departure(content, path.stem)) is not None:
        raise refusal(path, why)
    kept: dict[str, Any] = content
    return kept


def check_version(path: Path, content: Any) -> None:
    """Refuse a manifest or report of another version of asapc, which is whole and still cannot be read."""
    expected = read_schema(path.stem)["properties"]["schema"]["const"]
    version = content.get("schema") if isinstance(content, dict) else None
    if version != expected and re.fullmatch(re.escape(expected.partition("/")[0]) + r"/\d{1,4}", str(version)):
        why = f"{path.name} is {version}, this one reads {expected}"
        raise CheckpointError(f"{path.parent} was written by another version of asapc: {why}", COMPILE)


def refusal(path: Path, why: str) -> AsapcError:
    """Return the error that says what is wrong with a file of a folder."""
    return CheckpointError(f"cannot read {path}: {why}", COMPILE)
