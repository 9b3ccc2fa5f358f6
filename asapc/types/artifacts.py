"""Files that a compilation writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, eq=False)
class OnnxArtifact:
    """An ONNX file that onnx.checker accepts."""

    path: Path
    opset: int


@dataclass(frozen=True, eq=False)
class EngineArtifact:
    """A serialised TensorRT engine.

    Attributes:
        path: the file.
        builder: which compiler made it, and its version.
        targets: GPU architectures it runs on, e.g. "SM89".
        refused: architectures that the compiler knows but cannot build this model for, with its reason.
        compatible: what it runs on beside: "version" for later versions of its builder, "hardware" for later GPUs.
        sha256: of the file, where it is known.
    """

    path: Path
    builder: str
    targets: tuple[str, ...]
    refused: Mapping[str, str]
    compatible: tuple[str, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, eq=False)
class EngineResult:
    """What came of the engine.

    Attributes:
        status: "omitted" where none was asked for.
        artifact: the engine, if it was built.
        reason: why it failed, in the words of the builder, else None.
        node: of the ONNX file, where the builder says at which it failed.
        not_run: why an engine that was built was not run; None where it was, and where there is none.
    """

    status: Literal["built", "failed", "omitted"]
    artifact: EngineArtifact | None = None
    reason: str | None = None
    node: str | None = None
    not_run: str | None = None
