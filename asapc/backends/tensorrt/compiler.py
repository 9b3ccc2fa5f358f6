"""Runs NVIDIA's parser and compiler, in a process of their own.

They are native code and sometimes crash on valid models, which must not end the whole compilation. `builder.py` starts
this module and waits for its answer. It imports neither torch nor more of asapc than its passes.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from asapc.errors import BuildError
from asapc.passes.base import PassManager
from asapc.passes.onnx.standard_attention import StandardAttention
from asapc.passes.onnx.unfuse_attention import UnfuseAttention


def main() -> None:
    """Read a request, a JSON object, from the last argument, and print the answer.

    The request holds `package`, `onnx`, `engine`, `largest_batch`, `ranges` of dynamic axes by input name and axis
    number, and `target`: the architecture of the GPU present, or null to build ahead of time for all that the package
    supports. `parent` and `seconds` limit the process. The answer holds `builder`, `targets` and `refused`; or `error`,
    `hint` and `node`; or `errno` and `file`.
    """
    request = json.loads(sys.argv[-1])
    limit_process(request["parent"], request["seconds"])
    # Native code prints what it likes; on stdout stands the answer alone.
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = build(request)
    except BuildError as error:
        answer = {"error": str(error), "hint": error.hint, "node": error.node}
    except OSError as error:
        if error.errno is None:
            raise
        answer = {"errno": error.errno, "file": error.filename or request["engine"]}
    os.write(answers, json.dumps(answer).encode())


def build(request: Mapping[str, Any]) -> dict[str, Any]:
    """Build an engine for every target that can have one; see `main`."""
    trt = importlib.import_module(request["package"])
    if request["target"] is None:
        capabilities = trt.ComputeCapability.__members__
        names = request["architectures"] or [name for name in capabilities if name.startswith("SM")]
        candidates = {name: capabilities[name] for name in names}
    else:
        candidates = {request["target"]: None}
    compiler = Compiler(trt, Path(request["onnx"]), request["largest_batch"], request["ranges"])
    refused: dict[str, str] = {}
    # One target that the compiler does not support fails the build for all, so each is tried alone first.
    for name, capability in candidates.items():
        try:
            data = compiler.build([capability])
        except BuildError as error:
            refused[name] = str(error)
    targets = sorted((name for name in candidates if name not in refused), key=lambda name: int(name[2:]))
    if not targets:
        reason = next(iter(refused.values()))
        hint = "run `asapc inspect` and report the operation that it names"
        raise BuildError(reason, hint, compiler.node_in(reason))
    if len(targets) > 1:
        data = compiler.build([candidates[name] for name in targets])
    Path(request["engine"]).write_bytes(data)
    builder = f"{request['package'].replace('_', '-')} {trt.__version__}"
    return {"builder": builder, "targets": targets, "refused": refused}


class Compiler:
    """Compiles one model with `tensorrt` or `tensorrt_rtx`, whose interfaces are nearly the same."""

    def __init__(
        self, trt: Any, path: Path, largest_batch: int, ranges: Mapping[str, Mapping[str, tuple[int, int]]]
    ) -> None:
        import onnx
        from google.protobuf.message import DecodeError

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
        try:
            model = PassManager([StandardAttention(), UnfuseAttention()])(onnx.load(path)).program
        except DecodeError as error:
            raise BuildError(f"{path.name} is not an ONNX model: {error}", "report the model") from error
        if not self.parser.parse(model.SerializeToString()):
            fault = self.parser.get_error(0)
            raise BuildError(
                f"TensorRT cannot parse the model: {fault.desc()}",
                "report the operation that it names",
                fault.node_name() or None,
            )
        self.nodes = [node.name for node in model.graph.node if node.name]
        self.largest_batch, self.ranges = largest_batch, ranges

    def node_in(self, reason: str) -> str | None:
        """Return the node that the compiler's reason names: the longest name, since one may begin as another does."""
        return max((name for name in self.nodes if name in reason), key=len, default=None)

    def build(self, capabilities: list[Any]) -> bytes:
        """Build a serialised engine for some compute capabilities; [None] means the GPU present."""
        config = self.builder.create_builder_config()
        if capabilities != [None]:
            config.num_compute_capabilities = len(capabilities)
            for i, capability in enumerate(capabilities):
                config.set_compute_capability(capability, i)
        profile = self.builder.create_optimization_profile()
        for i in range(self.network.num_inputs):
            tensor = self.network.get_input(i)
            ranges = {"0": (1, self.largest_batch), **self.ranges.get(tensor.name, {})}
            fixed = {str(axis): (size, size) for axis, size in enumerate(tensor.shape) if axis > 0 and size >= 0}
            least, most = zip(*({**ranges, **fixed}[str(axis)] for axis in range(len(tensor.shape))), strict=True)
            profile.set_shape(tensor.name, least, most, most)
        config.add_optimization_profile(profile)
        self.errors.clear()
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise BuildError(self.errors[-1] if self.errors else "TensorRT gave no reason", "see the report")
        return bytes(engine)


def limit_process(parent: int, seconds: int) -> None:
    """End this process with its parent, after a time, or where it takes more memory than there is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends this process
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)  # also where the parent is stopped; its default action ends native code too
    if sys.platform != "linux":
        return
    die_with(parent)
    # Where memory runs out all the same, as in a container, the kernel takes this process first.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    memory = available_memory()
    # Of data, not of addresses, of which CUDA reserves far more than there is memory.
    import resource

    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, however that ends."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def available_memory() -> int:
    """Return the bytes of memory that are free or can be freed, on Linux."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])
