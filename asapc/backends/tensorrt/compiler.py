"""Runs NVIDIA's parser and compiler, in a process of their own.

They are native code and sometimes crash on valid models, which must not end the whole compilation. `builder.py` starts
this module and waits for its answer. It imports neither torch nor more of asapc than its passes.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from asapc.backends.tensorrt.flavours import (
    NAMES,
    architectures,
    configure,
    lacks,
    load_timings,
    open_package,
    save_timings,
    strongly_typed,
)
from asapc.backends.tensorrt.log import hint_on, layers_of, told
from asapc.errors import BuildError
from asapc.passes.base import PassManager
from asapc.passes.onnx.inline_attention import InlineAttention
from asapc.passes.onnx.split_gemm import SplitGemm
from asapc.passes.onnx.standard_attention import StandardAttention
from asapc.passes.onnx.sum_by_product import SumByProduct
from asapc.passes.onnx.unfuse_attention import UnfuseAttention


def main() -> None:
    """Read a request, a JSON object, from the last argument, and print the answer.

    The request holds `package`; `onnx`, `engine` and `log`, files; `largest_batch`; `sizes`, least, best and largest,
    of open axes by input name and axis number; `options`, those of `types.engine.EngineOptions` that are not about
    sizes; and `target`: the architecture of the GPU present, or null to build ahead of time. Without `onnx` it asks
    what the package has. `parent` and `seconds` limit the process. The answer holds `builder`, `targets`, `refused`,
    `layers` and `notes`, or `builder`, `architectures` and `lacks`; or `error`, `hint` and `node`; or `errno` and
    `file`.
    """
    request = json.loads(sys.argv[-1])
    limit_process(request["parent"], request["seconds"])
    # Native code prints what it likes; on stdout stands the answer alone.
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = build(request) if "onnx" in request else facts(request["package"])
    except BuildError as error:
        answer = {"error": str(error), "hint": error.hint, "node": error.node}
    except OSError as error:
        if error.errno is None:
            raise
        answer = {"errno": error.errno, "file": error.filename or request["engine"]}
    os.write(answers, json.dumps(answer).encode())


def facts(package: str) -> dict[str, Any]:
    """Return what a package has and lacks; see `main`."""
    trt = open_package(package)
    builder = f"{NAMES[package]} {trt.__version__}"
    return {"builder": builder, "architectures": architectures(trt), "lacks": lacks(trt)}


def build(request: Mapping[str, Any]) -> dict[str, Any]:
    """Build an engine for every target that can have one; see `main`."""
    trt = open_package(request["package"])
    if request["target"] is None:
        names = request["options"]["architectures"] or architectures(trt)
        known = trt.ComputeCapability.__members__
        if unknown := [name for name in names if name not in known]:
            raise BuildError(
                f"{NAMES[request['package']]} does not build for {unknown[0]}", "build with TensorRT there"
            )
        candidates = {name: known[name] for name in names}
    else:
        candidates = {request["target"]: None}
    compiler = Compiler(trt, request)
    refused: dict[str, BuildError] = {}
    # One target that the compiler does not support fails the build for all, so each is tried alone first.
    for name, capability in candidates.items():
        try:
            data = compiler.build([capability])
        except BuildError as error:
            refused[name] = error
    targets = sorted((name for name in candidates if name not in refused), key=lambda name: int(name[2:]))
    if not targets:
        raise combine(refused)
    if len(targets) > 1:
        data = compiler.build([candidates[name] for name in targets])
    Path(request["engine"]).write_bytes(data)
    return {
        "builder": f"{request['package'].replace('_', '-')} {trt.__version__}",
        "targets": targets,
        "refused": {name: str(error) for name, error in refused.items()},
        "layers": layers_of(compiler.lines),
        "notes": list(dict.fromkeys(compiler.notes)),
    }


def combine(refused: Mapping[str, BuildError]) -> BuildError:
    """Return the error of a model that no architecture can have: what most of them say comes first, and its hint."""
    names: dict[str, list[str]] = {}
    for name, error in refused.items():
        names.setdefault(str(error), []).append(name)
    reasons = sorted(names, key=lambda reason: len(names[reason]), reverse=True)
    of_most = refused[names[reasons[0]][0]]
    texts = reasons if len(reasons) == 1 else [f"{', '.join(names[reason])}: {reason}" for reason in reasons]
    return BuildError("; ".join(texts), of_most.hint, of_most.node)


class Compiler:
    """Compiles one model with one of NVIDIA's packages, whose interfaces are nearly the same.

    Attributes:
        lines: of the log, as far as the last build goes.
        notes: what the user should know, in sentences.
    """

    def __init__(self, trt: Any, request: Mapping[str, Any]) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        path = Path(request["onnx"])
        self.trt, self.options, self.sizes = trt, request["options"], request["sizes"]
        self.largest_batch = request["largest_batch"]
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.notes: list[str] = []
        self.log = self.open_log(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(strongly_typed(trt))
        self.parser = trt.OnnxParser(self.network, self.log)
        try:
            passes = [InlineAttention(), StandardAttention(), UnfuseAttention(), SplitGemm(), SumByProduct()]
            model = PassManager(passes)(onnx.load(path)).program
        except DecodeError as error:
            raise BuildError(f"{path.name} is not an ONNX model: {error}", "report the model") from error
        self.nodes = [node.name for node in model.graph.node if node.name]
        if not self.parser.parse(model.SerializeToString()):
            faults = [self.parser.get_error(i) for i in range(self.parser.num_errors)]
            reason = told([fault.desc() for fault in faults])
            node = next((fault.node_name() for fault in faults if fault.node_name()), None)
            raise BuildError(f"TensorRT cannot parse the model: {reason}", hint_on(reason, parsing=True), node)

    def open_log(self, file: int) -> Any:
        """Return a logger that keeps all lines, also in a file: of a compiler that crashes, it is all that is left."""
        trt, lines, errors = self.trt, self.lines, self.errors

        class Log(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                lines.append(msg)
                if severity <= trt.ILogger.Severity.ERROR:
                    errors.append(msg)
                with suppress(OSError):  # a full disk is found out where the engine is written
                    os.write(file, f"{msg}\n".encode(errors="replace"))

        return Log()

    def node_in(self, reason: str) -> str | None:
        """Return the node that the compiler's reason names: the longest name, since one may begin as another does."""
        return max((name for name in self.nodes if name in reason), key=len, default=None)

    def build(self, capabilities: list[Any]) -> bytes:
        """Build a serialised engine for some compute capabilities; [None] means the GPU present."""
        config = self.builder.create_builder_config()
        configure(self.trt, config, self.options)
        if capabilities != [None]:
            config.num_compute_capabilities = len(capabilities)
            for i, capability in enumerate(capabilities):
                config.set_compute_capability(capability, i)
        config.add_optimization_profile(self.profile())
        timings = self.options["timing_cache"] and Path(self.options["timing_cache"])
        if timings and (note := load_timings(config, timings)):
            self.notes.append(note)
        self.lines.clear()
        self.errors.clear()
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            reason = told(self.errors) or "TensorRT gave no reason"
            raise BuildError(reason, hint_on(reason), self.node_in(reason))
        if timings:
            save_timings(config, timings)
        return bytes(engine)

    def profile(self) -> Any:
        """Return the sizes of all inputs: those asked for, else the network's own."""
        profile = self.builder.create_optimization_profile()
        for i in range(self.network.num_inputs):
            tensor = self.network.get_input(i)
            default = {"0": (1, self.largest_batch, self.largest_batch)}
            fixed = {str(axis): (size,) * 3 for axis, size in enumerate(tensor.shape) if axis > 0 and size >= 0}
            sizes = {**default, **self.sizes.get(tensor.name, {}), **fixed}
            profile.set_shape(tensor.name, *zip(*(sizes[str(axis)] for axis in range(len(tensor.shape))), strict=True))
        return profile


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
