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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from asapc.backends.base import temporary
from asapc.backends.tensorrt.durations import keep_tail
from asapc.backends.tensorrt.log import node_at_end
from asapc.backends.tensorrt.preflight import preflight
from asapc.backends.tensorrt.profiles import narrowed, open_sizes
from asapc.errors import BuildError, DependencyError, OptionError
from asapc.types.artifacts import EngineArtifact, EngineResult, OnnxArtifact
from asapc.types.engine import EngineLayer, EngineOptions
from asapc.types.graph import BATCH_AXIS, Axes
from asapc.types.options import Target

# It takes over the parent's import path, so that both run the same asapc.
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from asapc.backends.tensorrt.compiler import main; main()"
)
# Engines take seconds to minutes; a compiler that hangs must not hang the run for ever.
MAX_SECONDS = 3600
WITHOUT = ("onnx", "cuda")  # targets without an engine
DEFAULTS = EngineOptions()


def try_engine(
    target: Target,
    onnx: OnnxArtifact,
    path: Path,
    largest_batch: int,
    axes: Axes | None = None,
    options: EngineOptions = DEFAULTS,
) -> EngineResult:
    """Build an engine if the target has one; see `build_engine`.

    Raises:
        AsapcError: an engine that was asked for by name cannot be built. With "auto" that is part of the result.
    """
    if target in WITHOUT:
        return EngineResult("omitted")
    try:
        return EngineResult("built", build_engine(onnx, path, largest_batch, axes, target, options))
    except (BuildError, DependencyError) as error:
        if target != "auto":
            raise
        node = error.node if isinstance(error, BuildError) else None
        return EngineResult("failed", reason=str(error), hint=error.hint, node=node)


def build_engine(
    onnx: OnnxArtifact,
    path: Path,
    largest_batch: int,
    axes: Axes | None = None,
    target: Target = "auto",
    options: EngineOptions = DEFAULTS,
) -> EngineArtifact:
    """Build an engine for batches from 1 to `largest_batch`, fastest at the largest.

    Args:
        onnx: the model; networks are strongly typed, so its precision is the engine's.
        path: file to write; it appears whole or not at all.
        largest_batch: largest size of the first axis of every input, unless `axes` has one.
        axes: dynamic axes by input name and axis number; the engine is fastest where they are longest.
        target: the builder, or "auto" for whichever there is.
        options: what else is asked of it, see `check_options`; profiles fit the axes, see `profiles.narrowed`.

    Returns:
        The engine, with the GPU targets that it runs on and the reasons why others were refused.

    Raises:
        DependencyError: the builder is not installed, or needs a GPU.
        BuildError: the parser or the compiler refuses the model, crashes on it, or exceeds its time or memory.
        OSError: the engine cannot be written.
    """
    package, log = builder_package(target), path.with_name(f"{path.name}.log")
    shapes = {name: tuple(size for size, _, _ in sizes) for name, sizes in options.profiles.items()}
    whole = {name: {0: BATCH_AXIS} for name in shapes}
    sizes = narrowed(options.profiles, shapes, axes or whole, largest_batch) if shapes else {}
    sizes = sizes or open_sizes(axes or {}, largest_batch)
    request = {
        "package": package,
        "target": "SM{}{}".format(*torch.cuda.get_device_capability()) if package == "tensorrt" else None,
        "onnx": str(onnx.path),
        "engine": str(temporary(path)),
        "log": str(log),
        "largest_batch": largest_batch,
        "sizes": sizes,
        "options": {
            "architectures": options.architectures,
            "workspace": options.workspace,
            "timing_cache": None if options.timing_cache is None else str(options.timing_cache),
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
        },
    }
    try:
        preflight(package, onnx.path, largest_batch, sizes)
        answer = compile_apart(request)
        temporary(path).rename(path)
    except BuildError as error:
        raise located(error, onnx) from None
    finally:
        for file in (temporary(path), log):
            file.unlink(missing_ok=True)
    compatible = [name for name in ("version", "hardware") if getattr(options, f"{name}_compatible")]
    layers = [EngineLayer.of(**layer) for layer in answer["layers"]]
    return EngineArtifact(
        path,
        answer["builder"],
        tuple(answer["targets"]),
        answer["refused"],
        tuple(compatible),
        layers=tuple(layers),
        notes=tuple(answer["notes"]),
    )


def check_options(target: Target, options: EngineOptions) -> None:
    """Refuse what a target cannot do, before anything is built.

    Raises:
        OptionError: it builds no engine, or its builder has no such option or architecture.
        DependencyError: the builder is not installed, or needs a GPU; with "auto" only where options ask for an engine.
        BuildError: it cannot be loaded.
    """
    if target in WITHOUT:
        if options.flags:
            raise OptionError(
                f"{options.flags[0]} is about an engine, and --target {target} builds none",
                "omit it, or choose --target tensorrt-rtx or tensorrt",
            )
        return
    if target == "auto" and not options.flags:
        return
    package = builder_package(target)
    if not options.flags:
        return
    cache = options.timing_cache
    if cache is not None and (cache.is_dir() or not cache.absolute().parent.is_dir()):
        raise OptionError(f"--timing-cache cannot be {cache}: it is no file in a folder that exists", "give a file")
    facts = compile_apart({"package": package})
    for flag in options.flags:
        if flag in facts["lacks"]:
            other = "omit it" if package == "tensorrt" else "omit it, or use --target tensorrt on a machine with a GPU"
            raise OptionError(f"{facts['builder']} has no {flag}: {facts['lacks'][flag]}", other)
    if unknown := [name for name in options.architectures if name not in facts["architectures"]]:
        known = ", ".join(name.lower() for name in facts["architectures"])
        raise OptionError(f"{facts['builder']} does not build for {unknown[0].lower()}", f"--gpu-arch takes {known}")


def located(error: BuildError, onnx: OnnxArtifact) -> BuildError:
    """Return an error that says which of the user's modules and lines its node comes from."""
    if error.node is None:
        return error
    name = "" if error.node in str(error) else f"at node {error.node}"
    where = ", ".join(filter(None, [name, str(onnx.place_of(error.node))]))
    return BuildError(f"{error} ({where})", error.hint, error.node) if where else error


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
        raise crash(f"TensorRT's compiler took more than {MAX_SECONDS} s and was stopped", request) from None
    if not process.stdout:
        raise crash(f"TensorRT's compiler crashed on the model ({cause(process)})", request)
    answer: dict[str, Any] = json.loads(process.stdout)
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
    if "error" in answer:
        raise BuildError(answer["error"], answer["hint"], answer["node"])
    return answer


def crash(message: str, request: Mapping[str, Any]) -> BuildError:
    """Return the error for a compiler that gave no answer, with what its log says of its last steps."""
    log = Path(request.get("log", os.devnull))
    kept = keep_tail(log) if log.is_file() else None
    hint = "report the model, and this line" + ("" if kept is None else f", with the end of NVIDIA's log, {kept}")
    if not log.is_file():
        return BuildError(message, hint)
    return BuildError(message, hint, node_at_end(log.read_text(errors="replace").splitlines(), Path(request["onnx"])))


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
