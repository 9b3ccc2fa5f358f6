"""Builds a TensorRT engine from an ONNX file with NVIDIA's own parser and compiler.

TensorRT proper builds on the GPU that the engine is for, and is used where it is installed and a GPU is present.
Elsewhere TensorRT-RTX builds ahead of time, without a GPU or a driver, for the architectures that it supports;
data-centre Hopper and Blackwell are not among them.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from asapc.backends.base import temporary
from asapc.backends.tensorrt.preflight import preflight
from asapc.errors import BuildError, DependencyError
from asapc.types.artifacts import EngineArtifact, EngineResult, OnnxArtifact
from asapc.types.graph import Axes
from asapc.types.options import Target

# It takes over the parent's import path, so that both run the same asapc.
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from asapc.backends.tensorrt.compiler import main; main()"
)
# Engines take seconds to minutes; a compiler that hangs must not hang the run for ever.
MAX_SECONDS = 3600


def try_engine(
    target: Target, onnx: OnnxArtifact, path: Path, largest_batch: int, axes: Axes | None = None
) -> EngineResult:
    """Build an engine if the target has one; see `build_engine`.

    Raises:
        AsapcError: an engine that was asked for by name cannot be built. With "auto" that is part of the result.
    """
    if target in ("onnx", "cuda"):
        return EngineResult("omitted")
    try:
        return EngineResult("built", build_engine(onnx, path, largest_batch, axes, target))
    except (BuildError, DependencyError) as error:
        if target != "auto":
            raise
        node = error.node if isinstance(error, BuildError) else None
        return EngineResult("failed", reason=str(error), node=node)


def build_engine(
    onnx: OnnxArtifact,
    path: Path,
    largest_batch: int,
    axes: Axes | None = None,
    target: Target = "auto",
    architectures: Sequence[str] | None = None,
) -> EngineArtifact:
    """Build an engine for batches from 1 to `largest_batch`, fastest at the largest.

    Args:
        onnx: the model; networks are strongly typed, so its precision is the engine's.
        path: file to write; it appears whole or not at all.
        largest_batch: largest size of the first axis of every input, unless `axes` has one.
        axes: dynamic axes by input name and axis number; the engine is fastest where they are longest.
        target: the builder, or "auto" for whichever there is.
        architectures: of GPUs, like "SM89", where it is built ahead of time; None for all that the builder knows.

    Returns:
        The engine, with the GPU targets that it runs on and the reasons why others were refused.

    Raises:
        DependencyError: the builder is not installed, or needs a GPU.
        BuildError: the parser or the compiler refuses the model, crashes on it, or exceeds its time or memory.
        OSError: the engine cannot be written.
    """
    package = builder_package(target)
    ranges = {
        name: {number: (axis.low, axis.high or largest_batch) for number, axis in of_input.items()}
        for name, of_input in (axes or {}).items()
    }
    preflight(package, onnx.path, largest_batch, ranges)
    request = {
        "package": package,
        "target": "SM{}{}".format(*torch.cuda.get_device_capability()) if package == "tensorrt" else None,
        "architectures": architectures,
        "onnx": str(onnx.path),
        "engine": str(temporary(path)),
        "largest_batch": largest_batch,
        "ranges": ranges,
    }
    try:
        answer = compile_apart(request)
        temporary(path).rename(path)
    finally:
        temporary(path).unlink(missing_ok=True)
    return EngineArtifact(path, answer["builder"], tuple(answer["targets"]), answer["refused"])


def builder_package(target: Target) -> str:
    """Return the Python package of a target's builder.

    Raises:
        DependencyError: it is not installed, or needs a GPU.
    """
    gpu = torch.cuda.is_available()
    if target != "tensorrt-rtx" and gpu and importlib.util.find_spec("tensorrt"):
        return "tensorrt"
    if target != "tensorrt" and importlib.util.find_spec("tensorrt_rtx"):
        return "tensorrt_rtx"
    if target == "tensorrt":
        lack = "is not installed" if gpu else "needs an NVIDIA GPU, and torch sees none"
        raise DependencyError(f"TensorRT {lack}", "pip install tensorrt on a GPU, or omit --target")
    raise DependencyError(
        "no TensorRT builder is installed",
        "pip install tensorrt-rtx-cu12 (no GPU needed), or tensorrt on a GPU",
    )


def compile_apart(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run `compiler.main` in a process of its own and return its answer.

    Raises:
        BuildError: the compiler refuses the model, or its process crashes or takes too long.
        OSError: it cannot write the engine.
    """
    limits = {"parent": os.getpid(), "seconds": MAX_SECONDS}
    command = [sys.executable, "-c", CHILD, json.dumps(sys.path), json.dumps({**request, **limits})]
    try:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=MAX_SECONDS
        )
    except subprocess.TimeoutExpired:
        hint = "report the model, and this line"
        raise BuildError(f"TensorRT's compiler took more than {MAX_SECONDS} s and was stopped", hint) from None
    if not process.stdout:
        raise BuildError(
            f"TensorRT's compiler crashed on the model ({cause(process)})", "report the model, and this line"
        )
    answer: dict[str, Any] = json.loads(process.stdout)
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
    if "error" in answer:
        raise BuildError(answer["error"], answer["hint"], answer["node"])
    return answer


def cause(process: "subprocess.CompletedProcess[str]") -> str:
    """Return why a process ended, in a few words."""
    last_line = (process.stderr.strip().splitlines() or ["no output"])[-1]
    if "bad_alloc" in last_line or "MemoryError" in last_line:
        return "out of memory"
    if process.returncode >= 0:
        return last_line
    if -process.returncode == getattr(signal, "SIGKILL", 9):
        return "SIGKILL, as the system sends it when memory runs out"
    return signal.Signals(-process.returncode).name
