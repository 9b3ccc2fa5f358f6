"""The part of CUDA that running an engine needs, through NVIDIA's `cuda-bindings`: memory, a stream, events, graphs.

Without torch, so that an engine can be served where torch is not installed.
"""

import ctypes
import importlib
import sys
from typing import Any

import numpy as np

from asapc.errors import BuildError, DependencyError

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
INSTALL = 'pip install "asapc[gpu]", or cuda-bindings alone'
NO_GPU = "run it on a machine with an NVIDIA GPU and its driver; ONNX Runtime runs model.onnx on any machine"


class Cuda:
    """One stream on the current GPU (the first that CUDA_VISIBLE_DEVICES leaves), in calls that raise on errors.

    Attributes:
        name: what NVIDIA calls the GPU.
        capability: its architecture, such as (8, 9).
        stream: handle of the stream.

    Raises:
        DependencyError: there is no driver or no GPU, or `cuda-bindings` is not installed.
    """

    def __init__(self) -> None:
        no_gpu = DependencyError("an engine needs an NVIDIA GPU with its driver, and this machine has none", NO_GPU)
        if not driver_loads():  # said first: without one, no package helps
            raise no_gpu
        try:
            # Named apart from the statement, so that only who runs engines needs the package, type checkers included.
            self.runtime: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError:
            raise DependencyError("an engine runs through NVIDIA's cuda-bindings, which is missing", INSTALL) from None
        try:
            count = self.call("cudaGetDeviceCount")
        except (BuildError, RuntimeError):  # a driver without a GPU, or too old for the package
            count = 0
        if not count:
            raise no_gpu
        device = self.call("cudaGetDevice")
        properties = self.call("cudaGetDeviceProperties", device)
        self.capability = int(properties.major), int(properties.minor)
        self.name = properties.name.split(b"\0")[0].decode(errors="replace")
        self.stream = self.call("cudaStreamCreate")

    def call(self, function: str, *args: Any) -> Any:
        """Call a function of CUDA's runtime, and return what it returns besides its error code.

        Raises:
            BuildError: the code is not 0.
        """
        code, *results = getattr(self.runtime, function)(*args)
        if int(code):
            raise BuildError(f"CUDA refuses {function}: {code.name}", "see whether nvidia-smi shows a healthy GPU")
        return results[0] if results else None

    def allocate(self, size: int) -> int:
        """Return the address of so many bytes on the GPU."""
        try:
            return int(self.call("cudaMalloc", max(size, 1)))
        except BuildError as error:
            hint = "free memory on the GPU, or build the engine for smaller batches"
            raise BuildError(f"{error} of {size:,} bytes", hint) from None

    def free(self, address: int) -> None:
        """Give memory back."""
        self.call("cudaFree", address)

    def upload(self, address: int, array: "np.ndarray[Any, Any]") -> None:
        """Copy a contiguous array to the GPU, in the stream's order."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: "np.ndarray[Any, Any]", address: int) -> None:
        """Copy from the GPU into a contiguous array, in the stream's order; it is there after `wait`."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def wait(self) -> None:
        """Wait until the stream has done all that it was given."""
        self.call("cudaStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """Record what the stream is given from here on instead of running it."""
        # Of this thread alone: other threads of a server allocate memory meanwhile, which is no concern of the graph.
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)

    def end_capture(self) -> Any:
        """Return what was recorded, ready to be replayed.

        Raises:
            BuildError: something in it cannot be recorded.
        """
        graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def replay(self, graph: Any) -> None:
        """Give the stream a recorded graph."""
        self.call("cudaGraphLaunch", graph, self.stream)

    def drop(self, graph: Any) -> None:
        """Drop a recorded graph."""
        self.call("cudaGraphExecDestroy", graph)

    def event(self) -> Any:
        """Return an event that marks this place in the stream."""
        event = self.call("cudaEventCreate")
        self.call("cudaEventRecord", event, self.stream)
        return event

    def between(self, start: Any, end: Any) -> float:
        """Wait for the later of two events, and return the milliseconds between them; they are gone then."""
        self.call("cudaEventSynchronize", end)
        milliseconds = float(self.call("cudaEventElapsedTime", start, end))
        for event in (start, end):
            self.call("cudaEventDestroy", event)
        return milliseconds


def driver_loads() -> bool:
    """Return whether NVIDIA's driver is installed."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True
