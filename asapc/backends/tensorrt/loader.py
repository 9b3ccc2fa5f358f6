"""Opens engines, and refuses those that must not be run here.

Deserialising an engine runs native code: it maps kernels and resources out of the file into the process, and TensorRT
checks little of what it reads. A damaged file may crash the process, and a crafted one may do anything. So nothing
reaches TensorRT here but the very bytes whose hash the folder's manifest and report state, and only where they were
built by this flavour and version, for this system and GPU. A manifest is no signature, however: who can write the
folder can write its hashes too. Open folders alone that you would run programs from.
"""

import importlib
import platform
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from asapc.backends.tensorrt.cuda import Cuda
from asapc.backends.tensorrt.runner import EngineRunner
from asapc.errors import CheckpointError, DependencyError, one_line
from asapc.types.artifacts import EngineArtifact

AGAIN = "compile the model again, on this machine or for its GPU"
# Bytes of an engine from the second on; the first one says which kind it is, and differs by product and flags.
MAGIC = b"trt"
INSTALL = {"tensorrt": "pip install tensorrt", "tensorrt_rtx": "pip install tensorrt-rtx-cu12"}
# Beside versions within one: TensorRT 11 runs engines of 10 that were built version-compatible (its support matrix).
COMPATIBLE_MAJORS = ((10, 11),)
HARDWARE_COMPATIBLE = (8, 0)  # the least architecture of engines that are compatible with later ones: Ampere


def open_engine(folder: str | Path) -> EngineRunner:
    """Open the engine of a folder that `asapc compile` wrote.

    Args:
        folder: the folder.

    Returns:
        A runner on the current GPU.

    Raises:
        CheckpointError: the folder is not whole, holds no engine, or one for another system, version or GPU.
        DependencyError: the engine's flavour of TensorRT or `cuda-bindings` is not installed, or there is no GPU.
        BuildError: TensorRT refuses the engine all the same.
    """
    from asapc.loading.folder import read_folder

    folder = Path(folder)
    return open_checked(folder, read_folder(folder))


def open_checked(folder: Path, report: Mapping[str, Any]) -> EngineRunner:
    """Open the engine of a folder whose files are those that its manifest lists; see `open_engine`."""
    engine = engine_of(folder, report)
    system, built_on = f"{platform.system()}-{platform.machine()}", report["environment"]["platform"]
    if system != built_on:
        raise CheckpointError(f"{engine.path} was built on {built_on}, and this is {system}", AGAIN)
    return start_engine(engine)


def engine_of(folder: Path, report: Mapping[str, Any]) -> EngineArtifact:
    """Return the engine that a report lists.

    Raises:
        CheckpointError: it lists none.
    """
    for artifact in report["artifacts"]:
        if artifact["kind"] == "engine":
            return EngineArtifact(
                folder / artifact["path"],
                artifact["builder"],
                tuple(artifact["targets"]),
                artifact["refused"],
                tuple(artifact["compatible"]),
                artifact["sha256"],
            )
    reason = report["engine"]["reason"] or "none was asked for"
    raise CheckpointError(f"{folder} holds no engine: {reason}", "compile the model with --target tensorrt-rtx")


def start_engine(engine: EngineArtifact) -> EngineRunner:
    """Open an engine whose origin is known: one just built, or one of a folder that was read.

    Raises:
        CheckpointError, DependencyError, BuildError: see `open_engine`.
    """
    flavour, _, version = engine.builder.partition(" ")
    package = flavour.replace("-", "_")
    data = checked_bytes(engine, package)
    trt = library(engine, package, version)
    cuda = Cuda()
    check_gpu(engine, cuda)
    return EngineRunner(trt, data, engine.path.name, flavour, cuda, host_code="version" in engine.compatible)


def checked_bytes(engine: EngineArtifact, package: str) -> bytes:
    """Return the content of an engine's file, after a look at all that can be told from outside.

    Read once, so that what was looked at is what TensorRT gets.

    Raises:
        CheckpointError: it is not the file that was built, or no engine of this package.
    """
    try:
        data = engine.path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {engine.path}: {(error.strerror or str(error)).lower()}", AGAIN) from None
    if package not in INSTALL:
        raise CheckpointError(f"{engine.path} was built by {engine.builder}, which is no TensorRT", AGAIN)
    if engine.sha256 is not None and sha256(data).hexdigest() != engine.sha256:
        raise CheckpointError(f"cannot read {engine.path}: it changed since it was written", AGAIN)
    if not data.startswith(MAGIC, 1):
        raise CheckpointError(f"cannot read {engine.path}: it is no engine of {engine.builder}", AGAIN)
    return data


def library(engine: EngineArtifact, package: str, version: str) -> Any:
    """Return the module that runs an engine.

    Raises:
        DependencyError: it cannot be imported.
        CheckpointError: it has a version that does not run this engine.
    """
    try:
        trt = importlib.import_module(package)
    except ImportError as error:  # also of libraries that it needs
        raise DependencyError(
            f"{engine.path} needs {engine.builder}, which cannot be imported: {one_line(error)}", INSTALL[package]
        ) from None
    if not runs(trt.__version__, version, "version" in engine.compatible):
        name = engine.builder.split()[0]
        raise CheckpointError(
            f"{engine.path} was built by {engine.builder}, and this is {name} {trt.__version__}",
            f"{INSTALL[package]}=={version}, or compile the model again",
        )
    return trt


def runs(installed: str, built: str, compatible: bool) -> bool:
    """Return whether an installed version runs engines of another: the same, or a later one of compatible ones."""
    if installed == built or not compatible:
        return installed == built
    new, old = ([int(part) for part in re.findall(r"\d+", version)] for version in (installed, built))
    return old != [] and new >= old and (old[0], new[0]) in ((old[0], old[0]), *COMPATIBLE_MAJORS)


def check_gpu(engine: EngineArtifact, cuda: Cuda) -> None:
    """Raise CheckpointError where an engine has no code for a GPU."""
    target = "SM{}{}".format(*cuda.capability)
    compatible = "hardware" in engine.compatible and cuda.capability >= HARDWARE_COMPATIBLE
    if target not in engine.targets and not compatible:
        targets = ", ".join(engine.targets)
        raise CheckpointError(f"{engine.path} is for {targets}, and this GPU ({cuda.name}) is {target}", AGAIN)
