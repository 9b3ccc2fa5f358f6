"""Builds a TensorRT engine from an ONNX file with NVIDIA's own parser and compiler.

TensorRT proper builds on the GPU that the engine is for, and is used where it is installed and a GPU is present.
Elsewhere TensorRT-RTX builds ahead of time, without a GPU or a driver, for the architectures that it supports;
data-centre Hopper and Blackwell are not among them.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from asapc.backends.base import temporary
from asapc.errors import BuildError, DependencyError
from asapc.types.artifacts import EngineArtifact, OnnxArtifact
from asapc.types.graph import DynamicAxis

# It takes over the parent's import path, so that both run the same asapc.
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from asapc.backends.tensorrt.compiler import main; main()"
)


def build_engine(
    onnx: OnnxArtifact,
    path: Path,
    largest_batch: int,
    axes: Mapping[str, Mapping[int, DynamicAxis]] | None = None,
) -> EngineArtifact:
    """Build an engine for batches from 1 to `largest_batch`, fastest at the largest.

    Args:
        onnx: the model; networks are strongly typed, so its precision is the engine's.
        path: file to write; it appears whole or not at all.
        largest_batch: largest size of the first axis of every input, unless `axes` has one.
        axes: dynamic axes by input name and axis number; the engine is fastest where they are longest.

    Returns:
        The engine, with the GPU targets that it runs on and the reasons why others were refused.

    Raises:
        DependencyError: neither TensorRT-RTX nor, with a GPU, TensorRT is installed.
        BuildError: the parser or the compiler refuses the model, or crashes on it.
    """
    target = None
    if torch.cuda.is_available() and importlib.util.find_spec("tensorrt"):
        package = "tensorrt"
        target = "SM{}{}".format(*torch.cuda.get_device_capability())
    elif importlib.util.find_spec("tensorrt_rtx"):
        package = "tensorrt_rtx"
    else:
        raise DependencyError(
            "no TensorRT builder is installed",
            "pip install tensorrt-rtx-cu12 (no GPU needed), or tensorrt on a GPU",
        )
    ranges = {
        name: {number: (axis.low, axis.high or largest_batch) for number, axis in of_input.items()}
        for name, of_input in (axes or {}).items()
    }
    request = {
        "package": package,
        "target": target,
        "onnx": str(onnx.path),
        "largest_batch": largest_batch,
        "ranges": ranges,
    }
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "engine"
        answer = compile_apart({**request, "engine": str(engine), "answer": str(Path(folder) / "answer.json")})
        temporary(path).write_bytes(engine.read_bytes())
    temporary(path).rename(path)
    return EngineArtifact(path, answer["builder"], tuple(answer["targets"]), answer["refused"])


def compile_apart(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run `compiler.main` in a process of its own and return its answer.

    Raises:
        BuildError: the compiler refuses the model, or the process crashes.
    """
    command = [sys.executable, "-c", CHILD, json.dumps(sys.path), json.dumps(dict(request))]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    answer_file = Path(request["answer"])
    if not answer_file.is_file():
        last_line = (process.stderr.strip().splitlines() or ["no output"])[-1]
        why = signal.Signals(-process.returncode).name if process.returncode < 0 else last_line
        raise BuildError(f"TensorRT's compiler crashed on the model ({why})", "report the model, and this line")
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    if "error" in answer:
        raise BuildError(answer["error"], answer["hint"])
    return answer
