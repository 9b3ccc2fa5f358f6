"""Stands for a GPU: CUDA's runtime and TensorRT with as much of their interfaces as asapc uses, computing on the CPU.

An engine of the fake is the magic number and JSON: inputs and outputs with types and shapes. Each output is twice the
sum of all inputs, unless the module is given a function. `tests/backends/test_engine_runner.py` compares the names used
here with those of the real packages.
"""

import ctypes
import itertools
import json
import sys
from collections.abc import Callable
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from asapc.backends.tensorrt import cuda as cuda_module
from asapc.backends.tensorrt.loader import MAGIC

Code = IntEnum("Code", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorStreamCaptureUnsupported": 900})
Kind = IntEnum("Kind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
Mode = IntEnum("Mode", {"cudaStreamCaptureModeThreadLocal": 1})
STREAM = 7
CODES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


class FakeCuda:
    """`cuda.bindings.runtime`: memory by address, one stream that runs at once what it is given, and a clock.

    Attributes:
        memory: what is allocated.
        log: names of the functions that were called.
        refuse: functions that fail, with their code.
        milliseconds: what passes with each launch.
    """

    cudaMemcpyKind, cudaStreamCaptureMode, cudaError_t = Kind, Mode, Code

    def __init__(self, name: str = "Fake GPU", capability: tuple[int, int] = (8, 9), devices: int = 1) -> None:
        self.name, self.capability, self.devices = name, capability, devices
        self.memory: dict[int, bytearray] = {}
        self.log: list[str] = []
        self.refuse: dict[str, Code] = {}
        self.addresses, self.now, self.milliseconds = itertools.count(4096, 2**32), 0.0, 2.0
        self.recording: list[Callable[[], None]] | None = None
        self.graphs = self.events = 0

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        function = getattr(type(self), f"do_{name}")

        def call(*args: Any) -> tuple[Any, ...]:
            self.log.append(name)
            if name in self.refuse:
                if name == "cudaStreamEndCapture":
                    self.recording = None
                return (self.refuse[name], None)
            result = function(self, *args)
            return (Code.cudaSuccess,) if result is None else (Code.cudaSuccess, result)

        return call

    def give(self, work: Callable[[], None]) -> None:
        """Give the stream work, which it records or does."""
        if self.recording is not None:
            self.recording.append(work)
        else:
            self.now += self.milliseconds
            work()

    def do_cudaGetDeviceCount(self) -> int:
        return self.devices

    def do_cudaGetDevice(self) -> int:
        return 0

    def do_cudaGetDeviceProperties(self, device: int) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(name=self.name.encode() + b"\0\0", major=major, minor=minor)

    def do_cudaStreamCreate(self) -> int:
        return STREAM

    def do_cudaMalloc(self, size: int) -> int:
        address = next(self.addresses)
        self.memory[address] = bytearray(size)
        return address

    def do_cudaFree(self, address: int) -> None:
        del self.memory[address]

    def do_cudaMemcpyAsync(self, to: int, origin: int, count: int, kind: Kind, stream: int) -> None:
        assert stream == STREAM
        assert self.recording is None, "a copy in a graph would hold an address of the caller's"
        if kind == Kind.cudaMemcpyHostToDevice:
            assert count <= len(self.memory[to])
            self.memory[to][:count] = ctypes.string_at(origin, count)
        else:
            ctypes.memmove(to, bytes(self.memory[origin][:count]), count)

    def do_cudaStreamSynchronize(self, stream: int) -> None:
        assert stream == STREAM

    def do_cudaStreamBeginCapture(self, stream: int, mode: Mode) -> None:
        self.recording = []

    def do_cudaStreamEndCapture(self, stream: int) -> list[Callable[[], None]]:
        graph, self.recording = self.recording, None
        return graph

    def do_cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> list[Callable[[], None]]:
        self.graphs += 1
        return graph

    def do_cudaGraphDestroy(self, graph: object) -> None:
        pass

    def do_cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: int) -> None:
        for work in graph:
            self.give(work)

    def do_cudaGraphExecDestroy(self, graph: object) -> None:
        self.graphs -= 1

    def do_cudaEventCreate(self) -> list[float]:
        self.events += 1
        return [0.0]

    def do_cudaEventRecord(self, event: list[float], stream: int) -> None:
        event[0] = self.now

    def do_cudaEventSynchronize(self, event: list[float]) -> None:
        pass

    def do_cudaEventElapsedTime(self, start: list[float], end: list[float]) -> float:
        return end[0] - start[0]

    def do_cudaEventDestroy(self, event: list[float]) -> None:
        self.events -= 1


def twice_the_sum(arrays: dict[str, Any]) -> "np.ndarray[Any, Any]":
    return 2 * sum(array.astype(np.float64) for array in arrays.values())


class FakeContext:
    """`IExecutionContext`: takes shapes and addresses, and computes."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine, self.shapes, self.places, self.workspace = engine, {}, {}, 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert len(self.engine.cuda.memory[address]) >= size
        self.workspace = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        shape = self.engine.facts["outputs"][name]["shape"]
        return (next(iter(self.shapes.values()))[0], *shape[1:]) if shape[0] == "batch" else tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.places[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.cuda
        assert stream == STREAM
        assert self.workspace in cuda.memory, "the context has no memory"
        if self.engine.trt.failing or (cuda.recording is not None and self.engine.trt.uncapturable):
            self.engine.log.log(1, "enqueueV3: the stream cannot do this")
            return False
        shapes = dict(self.shapes)
        cuda.log.append("launch")
        cuda.give(lambda: self.compute(shapes))
        return True

    def compute(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Write the outputs for inputs of some shapes."""
        arrays = {name: self.array(name, shape) for name, shape in shapes.items()}
        for name in self.engine.facts["outputs"]:
            kind = CODES[self.engine.get_tensor_dtype(name).name]
            result = self.engine.trt.function(arrays) if self.engine.trt.function else twice_the_sum(arrays)
            data = np.ascontiguousarray(result, kind).tobytes()
            self.engine.cuda.memory[self.places[name]][: len(data)] = data

    def array(self, name: str, shape: tuple[int, ...]) -> "np.ndarray[Any, Any]":
        """Read an input."""
        kind = np.dtype(CODES[self.engine.get_tensor_dtype(name).name])
        count = int(np.prod(shape)) * kind.itemsize
        return np.frombuffer(bytes(self.engine.cuda.memory[self.places[name]][:count]), kind).reshape(shape)


class FakeEngine:
    """`ICudaEngine`."""

    device_memory_size_v2 = 256

    def __init__(self, trt: "FakeTensorRT", log: Any, facts: dict[str, Any]) -> None:
        self.trt, self.log, self.facts, self.cuda = trt, log, facts, trt.cuda
        self.tensors = {**facts["inputs"], **facts["outputs"]}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, number: int) -> str:
        return list(self.tensors)[number]

    def get_tensor_mode(self, name: str) -> str:
        return self.trt.TensorIOMode.INPUT if name in self.facts["inputs"] else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.tensors[name]["dtype"])

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        low, high = (tuple(self.tensors[name][bound]) for bound in ("low", "high"))
        return low, high, high

    def create_execution_context(self, strategy: Any) -> FakeContext:
        if isinstance(strategy, SimpleNamespace):
            self.trt.configs.append(strategy)
            assert strategy.cuda_graph_strategy == self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            strategy = strategy.strategy
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.trt.contexts += 1
        return FakeContext(self)

    def create_runtime_config(self) -> SimpleNamespace:
        assert hasattr(self.trt, "CudaGraphStrategy")
        config = SimpleNamespace()
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config


class FakeTensorRT(ModuleType):
    """`tensorrt`, or with `rtx` `tensorrt_rtx`.

    Attributes:
        seen: what was given to the native deserialiser.
        failing: whether launches fail.
        uncapturable: whether they fail while a graph is captured.
        function: what engines compute, of the inputs by name.
    """

    ILogger = type("ILogger", (), {"ERROR": 1, "__init__": lambda self: None})
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    def __init__(self, cuda: FakeCuda, version: str = "10.13.3.9", rtx: bool = False) -> None:
        super().__init__("tensorrt_rtx" if rtx else "tensorrt")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.cuda, self.__version__ = cuda, version
        self.seen: list[bytes] = []
        self.configs: list[SimpleNamespace] = []
        self.failing = self.uncapturable = False
        self.contexts = 0
        self.function: Callable[[dict[str, Any]], Any] | None = None
        if rtx:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    def Runtime(self, log: Any) -> SimpleNamespace:
        def deserialize(data: bytes) -> FakeEngine | None:
            self.seen.append(data)
            try:
                return FakeEngine(self, log, json.loads(data[1 + len(MAGIC) :]))
            except ValueError:
                log.log(1, "deserializeCudaEngine: the stream is corrupt")
                return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def engine_bytes(inputs: dict[str, Any] | None = None, outputs: dict[str, Any] | None = None) -> bytes:
    """An engine of the fake: of images (1 to 8, 4, 4) and logits of the same shape unless said otherwise."""
    inputs = inputs or {"images": {"dtype": "FLOAT", "low": [1, 4, 4], "high": [8, 4, 4]}}
    outputs = outputs or {"logits": {"dtype": "FLOAT", "shape": ["batch", 4, 4]}}
    return b"f" + MAGIC + json.dumps({"inputs": inputs, "outputs": outputs}).encode()


def install(monkeypatch: Any, cuda: FakeCuda | None, *modules: FakeTensorRT) -> None:
    """Put the fakes where imports find them, and no other TensorRT; without `cuda` there is no driver."""
    monkeypatch.setattr(cuda_module, "driver_loads", lambda: cuda is not None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    installed = {module.__name__: module for module in modules}
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, installed.get(name))
