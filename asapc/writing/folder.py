"""Writes the output folder: whole or not at all."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from asapc.errors import OutputError
from asapc.hashes import sha256
from asapc.pictures import SUFFIXES
from asapc.process.interrupts import held, state
from asapc.process.scratch import scratch_folder, sweep
from asapc.types.artifacts import EngineArtifact, OnnxArtifact
from asapc.types.interface import Interface

MANIFEST = "manifest.json"
MAX_MANIFEST = 2**20  # bytes; of the handful of files that asapc writes it has some hundreds
# Of the hidden folders beside an output in which it grows.
PREFIX = ".asapc."
# In such a folder: the earlier output, under its name, while the new one takes its place.
OLD = "old"
# What a system says of a disk with no space left, by quota or at all, of a file over its limit, and of one read-only.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def output_folder(path: Path, force: bool, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; give it that name when the block ends well, else remove it.

    Args:
        path: the folder to write.
        force: whether to replace it if it exists.
        check: raises OutputError if what stands there may not be replaced; None for `check_ours`.

    Raises:
        OutputError: `path` cannot be written, exists and `force` is not given, or holds anything that asapc did not
            write.
    """
    check = check or check_ours
    with temporary_folder(path, force, check) as folder:
        partial = folder / "new"
        partial.mkdir()
        yield partial
        check_free(path, force)  # another run may have finished meanwhile
        check(path)
        with held():
            if path.exists():
                (folder / OLD).mkdir()
                path.rename(folder / OLD / path.name)
            # A kill at this point is mended by the next run, which finds the earlier output and restores it.
            partial.rename(path)
            state.outputs.append(str(path))


@contextmanager
def output_file(path: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary file beside `path`; give it that name when the block ends well, else remove it.

    Raises:
        OutputError: `path` cannot be written, exists and `force` is not given, or is a folder.
    """
    with temporary_folder(path, force, check_no_folder) as folder:
        partial = folder / path.name
        yield partial
        check_free(path, force)
        with held():
            partial.rename(path)
            state.outputs.append(str(path))


def write_texts(texts: Mapping[Path, str], force: bool) -> None:
    """Write texts to files, all of them or none; see `output_file`."""
    with ExitStack() as files:
        partials = {files.enter_context(output_file(path, force)): text for path, text in texts.items()}
        for partial, text in partials.items():
            partial.write_text(text, encoding="utf-8")


def picture_file(path: Path, force: bool) -> AbstractContextManager[Path]:
    """Yield a temporary file for a picture, see `output_file`.

    Raises:
        OutputError: as there, or the name ends in no format of pictures.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"cannot draw {path}: it is named as no picture", f"use {', '.join(SUFFIXES)}")
    return output_file(path, force)


def check_free(path: Path, force: bool) -> None:
    """Raise OutputError if `path` exists and may not be replaced, or cannot even be looked at."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unwritable(path, error) from None
    if not force:
        raise OutputError(f"{path} exists already", "give --force to replace it, or another name")


def check_ours(path: Path) -> None:
    """Raise OutputError if `path` exists and is anything but a folder with the files that its manifest lists."""
    if not os.path.lexists(path):
        return
    own = listed_files(path / MANIFEST)
    if own is None:
        raise OutputError(f"{path} was not written by asapc, and is not replaced", "give another --out")
    others = sorted(
        entry.name for entry in os.scandir(path) if entry.name not in own or entry.is_dir(follow_symlinks=False)
    )
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise OutputError(
            f"{path} holds what asapc did not write, and is not replaced: {shown}",
            "move it elsewhere, or give another --out",
        )


def check_outside(path: Path) -> None:
    """Raise OutputError if `path` stands in a folder that asapc wrote, which is whole with the files it has alone."""
    for folder in Path(os.path.abspath(path)).parents:
        if listed_files(folder / MANIFEST) is not None:
            raise OutputError(
                f"{path} would stand in {folder}, which holds what `asapc compile` wrote and nothing else",
                "give a place outside that folder",
            )


def listed_files(manifest: Path) -> set[str] | None:
    """Return the names that a manifest lists, its own among them; None if it is not one of asapc's."""
    try:
        # A pipe would never end, and no manifest is as large as a link to a device.
        if manifest.is_symlink() or not manifest.is_file() or manifest.stat().st_size > MAX_MANIFEST:
            return None
        content = json.loads(manifest.read_text())
        if not content["schema"].startswith("asapc.manifest/"):
            return None
        return {manifest.name, *content["files"]}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def check_no_folder(path: Path) -> None:
    """Raise OutputError if `path` is a folder."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "give the name of a file")


@contextmanager
def temporary_folder(path: Path, force: bool, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a hidden folder beside `path`, on its file system so that renaming is atomic; remove it at the end.

    Folders above `path` are made as needed, and removed again if nothing came to stand in them. What killed runs left
    beside `path` is removed first, and the output that one was replacing restored.

    Raises:
        OutputError: `path` exists and `force` is not given, `check` refuses to replace it, it stands in a compiled
            folder, or it cannot be written.
    """
    check_outside(path)
    sweep(path.parent, PREFIX, restore)
    check_free(path, force)
    check(path)
    with ExitStack() as stack:
        try:
            parents = [folder for folder in path.parents if not folder.exists()]  # innermost first
            stack.callback(remove_empty, parents)
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch_folder(path.parent, PREFIX, restore))
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            yield folder
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise unwritable(path, error) from error


def restore(folder: Path) -> None:
    """Bring back the output that a run was replacing when it ended, unless the new one stands in its place.

    Raises:
        OSError: it cannot be moved; then it stays in the folder.
    """
    for old in (folder / OLD).glob("*"):
        path = folder.parent / old.name
        if not os.path.lexists(path):
            old.rename(path)


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return what to tell the user where the system refuses to write an output, or a temporary file for it."""
    why = (error.strerror or "unknown reason").lower()
    if error.errno == errno.EFBIG:
        return OutputError(f"cannot write {path}: {why}", "raise the limit of `ulimit -f`")
    if error.errno in FULL:
        return OutputError(f"cannot write {path}: {why}", "free space there and in the temporary folder, TMPDIR")
    return OutputError(f"cannot write {path}: {why}", "give another place")


def list_artifacts(folder: Path, models: Sequence[OnnxArtifact], engine: EngineArtifact | None) -> list[dict[str, Any]]:
    """Return the artefacts as the report lists them, paths relative to the folder."""
    operator = folder / "operator.safetensors"
    kinds: list[tuple[str, Path, dict[str, Any]]] = [
        *(
            ("onnx", path, {"builder": f"torch.onnx, opset {opset}", "targets": []})
            for path, opset in {onnx.path: onnx.opset for onnx in models}.items()
        ),
        *(
            (
                "engine",
                a.path,
                {
                    "builder": a.builder,
                    "targets": list(a.targets),
                    "refused": a.refused,
                    "compatible": list(a.compatible),
                },
            )
            for a in ([] if engine is None else [engine])
        ),
        ("operator", operator, {"builder": "asapc", "targets": []}),
    ]
    return [
        {"kind": kind, "path": str(path.relative_to(folder)), "sha256": sha256(path), **more}
        for kind, path, more in kinds
    ]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_manifest(folder: Path, model_sha256: str, version: str, interface: Interface) -> None:
    """Write manifest.json: the interface, size and hash of every file, and the hash of what they were made from."""
    files = {file.name: {"sha256": sha256(file), "bytes": file.stat().st_size} for file in sorted(folder.iterdir())}
    write_json(
        folder / MANIFEST,
        {
            "schema": "asapc.manifest/1",
            "asapc": version,
            "model_sha256": model_sha256,
            **interface.data(),
            "files": files,
        },
    )
