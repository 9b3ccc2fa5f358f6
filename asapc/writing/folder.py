"""Writes the output folder: whole or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from asapc.errors import OutputError
from asapc.hashes import sha256
from asapc.types.artifacts import EngineArtifact, OnnxArtifact
from asapc.types.choices import Selection
from asapc.types.site import Site


@contextmanager
def output_folder(path: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and else vanishes.

    Raises:
        OutputError: `path` cannot be written, exists and `force` is not given, or is nothing that asapc wrote.
    """
    check_free(path, force)
    if os.path.lexists(path) and not is_ours(path):
        raise OutputError(f"{path} is no folder that asapc wrote, and is not replaced", "give another --out")
    with temporary_folder(path) as folder:
        partial = folder / "new"
        partial.mkdir()
        yield partial
        check_free(path, force)  # another run may have finished meanwhile
        if path.exists():
            path.rename(folder / "old")
        partial.rename(path)


@contextmanager
def output_file(path: Path, force: bool) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well, and else vanishes.

    Raises:
        OutputError: `path` cannot be written, exists and `force` is not given, or is a folder.
    """
    check_free(path, force)
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "give the name of a file with --out")
    with temporary_folder(path) as folder:
        partial = folder / path.name
        yield partial
        check_free(path, force)
        partial.rename(path)


def check_free(path: Path, force: bool) -> None:
    """Raise OutputError if `path` exists and may not be replaced, or cannot even be looked at."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot write {path}: {str(error.strerror).lower()}", "give another --out") from None
    if not force:
        raise OutputError(f"{path} exists already", "give --force to replace it, or another --out")


def is_ours(path: Path) -> bool:
    """Whether a folder was written by asapc, as its manifest tells."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("schema", "")).startswith("asapc.manifest/")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, on its file system so that renaming is atomic; removed at the end.

    Folders above `path` are made as needed, and removed again if nothing came to stand in them.

    Raises:
        OutputError: the folder of `path` cannot be written.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in path.parents if not folder.exists()]  # innermost first
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix=".asapc.", dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {str(error.strerror).lower()}", "give another --out") from None
    try:
        with holder as name:
            yield Path(name)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise OutputError(f"cannot write {path}: {str(error.strerror).lower()}", "give another --out") from error
    finally:
        for folder in made:
            with suppress(OSError):  # not empty: the result stands there
                folder.rmdir()


def write_operators(path: Path, sites: Sequence[Site], selection: Selection) -> None:
    """Write the parameters of all operators as safetensors, named "<site>.<parameter>"."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for site in sites:
        params = selection.choices[site.name].candidate.params
        product, dtype = site.wiring.product, site.wiring.dtype
        if product is None:
            tensors[f"{site.name}.loop_scale"] = site.loop.scale.to(dtype)
        else:
            tensors[f"{site.name}.score_scale"] = product.score_scale.to(dtype)
        if params is not None:
            tensors[f"{site.name}.query_basis"] = params.query_basis
            tensors[f"{site.name}.key_basis"] = params.key_basis
            tensors[f"{site.name}.knots"] = params.knots
            tensors |= {f"{site.name}.weights.{i}": w for i, w in enumerate(params.weights)}
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def list_artifacts(folder: Path, models: Sequence[OnnxArtifact], engine: EngineArtifact) -> list[dict[str, Any]]:
    """The artefacts as the report lists them, paths relative to the folder."""
    operator = folder / "operator.safetensors"
    kinds: list[tuple[str, Path, dict[str, Any]]] = [
        *(
            ("onnx", path, {"builder": f"torch.onnx, opset {opset}", "targets": []})
            for path, opset in {onnx.path: onnx.opset for onnx in models}.items()
        ),
        (
            "engine",
            engine.path,
            {"builder": engine.builder, "targets": list(engine.targets), "refused": dict(engine.refused)},
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


def write_manifest(folder: Path, model_sha256: str, version: str) -> None:
    """Write manifest.json: size and hash of every file, and of the checkpoint that they were made from."""
    files = {file.name: {"sha256": sha256(file), "bytes": file.stat().st_size} for file in sorted(folder.iterdir())}
    write_json(
        folder / "manifest.json",
        {"schema": "asapc.manifest/1", "asapc": version, "model_sha256": model_sha256, "files": files},
    )
