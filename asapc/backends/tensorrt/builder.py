"""Builds a TensorRT engine from an ONNX file with NVIDIA's own parser and compiler.

TensorRT proper builds on the GPU that the engine is for, and is taken where it is installed and a GPU is
present. Everywhere else TensorRT-RTX builds ahead of time, without a GPU or a driver, for the architectures it
knows; data-centre Hopper and Blackwell are not among them.
"""

import importlib
import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from asapc.artifacts import EngineArtifact, OnnxArtifact
from asapc.backends.base import temporary
from asapc.errors import BuildError, DependencyError
from asapc.passes.unfuse_attention import UnfuseAttention


def build_engine(onnx: OnnxArtifact, path: Path, largest_batch: int) -> EngineArtifact:
    """Build an engine for batches from 1 to `largest_batch`, fastest at the largest.

    Args:
        onnx: the model; networks are strongly typed, so its precision is the engine's.
        path: file to write; it appears whole or not at all.
        largest_batch: largest size of the first axis of every input.

    Returns:
        The engine, with the GPU targets it runs on and the reasons why other targets were refused.

    Raises:
        DependencyError: neither TensorRT-RTX nor, with a GPU, TensorRT is installed.
        BuildError: the parser or the compiler refuses the model.
    """
    if torch.cuda.is_available() and importlib.util.find_spec("tensorrt"):
        trt, builder_name = importlib.import_module("tensorrt"), "tensorrt"
        major, minor = torch.cuda.get_device_capability()
        candidates = {f"SM{major}{minor}": None}
    elif importlib.util.find_spec("tensorrt_rtx"):
        trt, builder_name = importlib.import_module("tensorrt_rtx"), "tensorrt-rtx"
        known = trt.ComputeCapability.__members__
        candidates = {name: value for name, value in known.items() if name.startswith("SM")}
    else:
        raise DependencyError(
            "no TensorRT builder is installed",
            "pip install tensorrt-rtx-cu12 (no GPU needed), or tensorrt on a GPU",
        )
    compiler = Compiler(trt, onnx.path, largest_batch)
    refused: dict[str, str] = {}
    # One target that the compiler cannot serve fails a build for all, so each is tried alone first.
    for name, capability in candidates.items():
        try:
            data = compiler.build([capability])
        except BuildError as error:
            refused[name] = str(error)
    targets = sorted((name for name in candidates if name not in refused), key=lambda name: int(name[2:]))
    if not targets:
        raise BuildError(next(iter(refused.values())), "run `asapc inspect` and report the operation that it names")
    if len(targets) > 1:
        data = compiler.build([candidates[name] for name in targets])
    temporary(path).write_bytes(data)
    temporary(path).rename(path)
    return EngineArtifact(path, f"{builder_name} {trt.__version__}", tuple(targets), refused)


class Compiler:
    """One model and NVIDIA's compiler, `tensorrt` or `tensorrt_rtx`: nearly the same module twice."""

    def __init__(self, trt: Any, path: Path, largest_batch: int) -> None:
        errors: list[str] = []

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    errors.append(msg)

        self.trt, self.errors, self.log = trt, errors, Log()
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, self.log)
        import onnx
        from google.protobuf.message import DecodeError

        try:
            model = UnfuseAttention()(onnx.load(path)).program
        except DecodeError as error:
            raise BuildError(f"{path.name} is no ONNX model: {error}", "report the model") from error
        with deferred_interrupt():
            parsed = self.parser.parse(model.SerializeToString())
        if not parsed:
            raise BuildError(
                f"TensorRT cannot parse the model: {self.parser.get_error(0).desc()}",
                "report the operation that it names",
            )
        self.largest_batch = largest_batch

    def build(self, capabilities: list[Any]) -> bytes:
        """Serialised engine for the given compute capabilities; [None] means the GPU at hand."""
        config = self.builder.create_builder_config()
        if capabilities != [None]:
            config.num_compute_capabilities = len(capabilities)
            for i, capability in enumerate(capabilities):
                config.set_compute_capability(capability, i)
        profile = self.builder.create_optimization_profile()
        for i in range(self.network.num_inputs):
            tensor = self.network.get_input(i)
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (1, *rest), (self.largest_batch, *rest), (self.largest_batch, *rest))
        config.add_optimization_profile(profile)
        self.errors.clear()
        with deferred_interrupt():
            engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise BuildError(self.errors[-1] if self.errors else "TensorRT gave no reason", "see the report")
        return bytes(engine)


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Keep Ctrl-C until the block ends: TensorRT swallows exceptions that arise while it calls its logger."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals arrive in the main thread only
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt
