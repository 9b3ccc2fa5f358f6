"""Runs a TensorRT engine on a GPU, of any flavour: TensorRT 10.9 and newer, TensorRT 11, TensorRT-RTX.

Numpy in, numpy out, without torch; `runner.py` takes torch's tensors. `loader.py` says which engines may be run.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import numpy as np

from asapc.backends.tensorrt.cuda import Cuda
from asapc.backends.tensorrt.ports import DTYPES, Port
from asapc.errors import BuildError, SamplesError

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
Shapes = Mapping[str, tuple[int, ...]]
# Shapes of inputs that stay ready to run. Each has a context and a CUDA graph; their memory is shared.
MAX_SESSIONS = 16


@dataclass
class Session:
    """An execution context for inputs of one shape.

    Attributes:
        context: with shapes and addresses set.
        outputs: shapes by name.
        graph: what replays it; None where it is launched.
        ran: whether it has run, which comes before a graph can be captured.
    """

    context: Any
    outputs: Shapes
    graph: Any = None
    ran: bool = False


class Engine:
    """An engine in the GPU's memory, with a buffer for each input and output, as large as its largest shape needs.

    The first call with inputs of a shape launches the engine and captures a CUDA graph; later ones replay the graph.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`, of the version that built the engine.
        data: the serialised engine. Deserialising it runs native code: it must come from `loader.open_engine`.
        name: what messages call it.
        runtime: what reports call the runtime.
        cuda: the GPU.
        host_code: whether the engine may bring code for the CPU: version-compatible ones carry a runtime of their own.

    Attributes:
        inputs: type and shapes of each, by name.
        outputs: names, in the engine's order.
        device: name of the GPU.
        note: why calls are launched instead of replayed as CUDA graphs; empty where they are replayed.

    Raises:
        BuildError: TensorRT refuses the engine, or the GPU has too little memory for it.
    """

    def __init__(self, trt: Any, data: bytes, name: str, runtime: str, cuda: Cuda, host_code: bool = False) -> None:
        self.trt, self.name, self.runtime, self.cuda, self.device = trt, name, runtime, cuda, cuda.name
        self.note, self.lock = "", Lock()  # there is one buffer for each tensor: one call at a time
        self.errors: list[str] = []
        self.log = error_log(trt, self.errors)  # outlives all that is made with it
        self.deserialiser = trt.Runtime(self.log)
        if host_code:
            self.deserialiser.engine_host_code_allowed = True
        self.engine = self.deserialiser.deserialize_cuda_engine(data)
        if self.engine is None:
            raise self.failure("load")
        tensors = [self.engine.get_tensor_name(number) for number in range(self.engine.num_io_tensors)]
        self.dtypes = {tensor: self.dtype(tensor) for tensor in tensors}
        self.inputs: dict[str, Port] = {}
        for tensor in tensors:
            if self.engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                low, _, high = self.engine.get_tensor_profile_shape(tensor, 0)
                self.inputs[tensor] = Port(self.dtypes[tensor], tuple(low), tuple(high))
        self.outputs = [tensor for tensor in tensors if tensor not in self.inputs]
        self.sessions: OrderedDict[tuple[tuple[int, ...], ...], Session] = OrderedDict()
        self.memory: list[int] = []
        try:
            self.workspace = self.allocate(self.engine.device_memory_size_v2)
            # Once and for all: a captured graph holds addresses.
            largest = {tensor: port.high for tensor, port in self.inputs.items()}
            shapes = {**largest, **self.output_shapes(self.new_context(largest))}
            self.sizes = {tensor: self.bytes_of(tensor, shapes[tensor]) for tensor in tensors}
            self.buffers = {tensor: self.allocate(size) for tensor, size in self.sizes.items()}
        except BuildError:
            self.close()
            raise

    def allocate(self, size: int) -> int:
        """Return the address of so many bytes on the GPU, which `close` frees."""
        self.memory.append(self.cuda.allocate(size))
        return self.memory[-1]

    def dtype(self, tensor: str) -> "np.dtype[Any]":
        """Return the type of an input or output."""
        kind = self.engine.get_tensor_dtype(tensor).name
        if kind not in DTYPES:
            raise BuildError(f"{tensor} of {self.name} is {kind}, which numpy lacks", "cast it to float32 in the model")
        return np.dtype(DTYPES[kind])

    def bytes_of(self, tensor: str, shape: Sequence[int]) -> int:
        """Return the bytes of a tensor of a shape."""
        return prod(shape) * self.dtypes[tensor].itemsize

    def failure(self, verb: str) -> BuildError:
        """Return the error that says why TensorRT failed."""
        reason = self.errors[-1] if self.errors else "it gives no reason"
        self.errors.clear()
        return BuildError(f"TensorRT cannot {verb} {self.name}: {reason}", "build the engine again on this machine")

    def new_context(self, shapes: Shapes) -> Any:
        """Return a context for inputs of some shapes, in the memory that all contexts share.

        NVIDIA advises one context for each graph, since changing a context breaks the graphs that were captured on it,
        and shared memory, since they never run at the same time.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures_itself:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise self.failure("run")
        context.set_device_memory(self.workspace, self.engine.device_memory_size_v2)
        for tensor, shape in shapes.items():
            if not context.set_input_shape(tensor, shape):
                raise self.failure("run")
        return context

    @property
    def captures_itself(self) -> bool:
        """Whether TensorRT captures graphs: TensorRT-RTX knows when its kernels for a shape are compiled."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def output_shapes(self, context: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the outputs, once those of the inputs are set."""
        shapes = {tensor: tuple(context.get_tensor_shape(tensor)) for tensor in self.outputs}
        if unknown := [tensor for tensor, shape in shapes.items() if min(shape, default=0) < 0]:
            raise BuildError(f"the shape of {unknown[0]} of {self.name} depends on data", "report the model")
        return shapes

    def session(self, shapes: Shapes) -> Session:
        """Return the session for inputs of some shapes, and drop the one that was not used for longest."""
        key = tuple(shapes.values())
        if key not in self.sessions:
            while len(self.sessions) >= MAX_SESSIONS:
                self.forget(self.sessions.popitem(last=False)[1])
            context = self.new_context(shapes)
            outputs = self.output_shapes(context)
            if any(self.bytes_of(tensor, shape) > self.sizes[tensor] for tensor, shape in outputs.items()):
                raise BuildError(f"an output of {self.name} is largest for smaller inputs", "report the model")
            for tensor, address in self.buffers.items():
                context.set_tensor_address(tensor, address)
            self.sessions[key] = Session(context, outputs)
        self.sessions.move_to_end(key)
        return self.sessions[key]

    def forget(self, session: Session) -> None:
        """Free what a session holds."""
        if session.graph is not None:
            self.cuda.drop(session.graph)

    def upload(self, arrays: Arrays) -> Session:
        """Copy inputs to the GPU, and return the session for their shapes.

        Raises:
            SamplesError: they are not what the engine takes.
        """
        if arrays.keys() != self.inputs.keys():
            given, taken = ", ".join(arrays), ", ".join(self.inputs)
            raise SamplesError(f"{self.name} takes {taken}, and got {given}", "name the arrays as the inputs")
        for tensor, port in self.inputs.items():
            array = arrays[tensor]
            if array.dtype != port.dtype or not port.takes(array.shape):
                raise SamplesError(
                    f"{tensor} is {array.dtype} {array.shape}, and {self.name} takes {port}",
                    "pass inputs of that type and shape, or build the engine for others",
                )
        for tensor in self.inputs:
            self.cuda.upload(self.buffers[tensor], np.ascontiguousarray(arrays[tensor]))
        # A copy from memory that is not pinned has been taken when the call returns.
        return self.session({tensor: tuple(arrays[tensor].shape) for tensor in self.inputs})

    def launch(self, session: Session) -> None:
        """Give the stream one run."""
        if session.graph is not None:
            self.cuda.replay(session.graph)
        elif not session.context.execute_async_v3(int(self.cuda.stream)):
            raise self.failure("run")
        if not session.ran:
            session.ran = True
            if not self.captures_itself:
                self.capture(session)

    def capture(self, session: Session) -> None:
        """Capture a graph of a session that has run once; where that fails, `note` says why, and runs are launched."""
        self.cuda.wait()
        try:
            self.cuda.begin_capture()
            recorded = session.context.execute_async_v3(int(self.cuda.stream))
            graph = self.cuda.end_capture()  # also after a failure, or the stream would record for ever
            if not recorded:
                self.cuda.drop(graph)
                raise self.failure("capture")
            session.graph = graph
        except BuildError as error:
            self.note = f"launched, without a CUDA graph: {error}"

    @property
    def batches(self) -> range:
        """The numbers of samples that the engine takes at once."""
        ports = self.inputs.values()
        return range(max(port.low[0] for port in ports), min(port.high[0] for port in ports) + 1)

    def run_in_parts(self, arrays: Arrays) -> dict[str, "np.ndarray[Any, Any]"]:
        """Return the outputs for any number of samples, in parts that the engine takes; see `run`."""
        least, most = self.batches[0], self.batches[-1]
        results = []
        for start in range(0, len(next(iter(arrays.values()))), most):
            part = {tensor: array[start : start + most] for tensor, array in arrays.items()}
            count = len(next(iter(part.values())))
            if count < least:
                last = {tensor: np.repeat(array[-1:], least - count, axis=0) for tensor, array in part.items()}
                part = {tensor: np.concatenate([array, last[tensor]]) for tensor, array in part.items()}
            results.append({tensor: array[:count] for tensor, array in self.run(part).items()})
        return {tensor: np.concatenate([result[tensor] for result in results]) for tensor in self.outputs}

    def run(self, arrays: Arrays) -> dict[str, "np.ndarray[Any, Any]"]:
        """Return the outputs by name.

        Args:
            arrays: inputs by name, of the types and within the shapes of `inputs`.

        Raises:
            SamplesError: they are not what the engine takes.
            BuildError: TensorRT or CUDA fails.
        """
        with self.lock:
            session = self.upload(arrays)
            self.launch(session)
            results = {tensor: np.empty(shape, self.dtypes[tensor]) for tensor, shape in session.outputs.items()}
            for tensor, result in results.items():
                self.cuda.download(result, self.buffers[tensor])
            self.cuda.wait()
            return results

    def milliseconds(self, arrays: Arrays) -> float:
        """Return what one run takes on the GPU, between two events; copies to and from it are left out.

        Raises:
            SamplesError, BuildError: see `run`.
        """
        with self.lock:
            session = self.upload(arrays)
            if not session.ran:
                self.launch(session)
            start = self.cuda.event()
            self.launch(session)
            return self.cuda.between(start, self.cuda.event())

    def close(self) -> None:
        """Free the GPU's memory; the runner is of no use then."""
        self.cuda.wait()
        for session in self.sessions.values():
            self.forget(session)
        self.sessions.clear()
        while self.memory:
            self.cuda.free(self.memory.pop())


def error_log(trt: Any, errors: list[str]) -> Any:
    """Return a logger that keeps TensorRT's errors in a list, and everything else to itself."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(msg)

    return Log()
