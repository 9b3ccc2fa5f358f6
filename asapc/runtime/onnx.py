"""Runs the ONNX file of a folder in ONNX Runtime, on an NVIDIA GPU or on the CPU."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asapc.backends.onnxruntime.library import library
from asapc.errors import BuildError, one_line
from asapc.loading.manifest import HALF, MODEL
from asapc.runtime.session import Unavailable

DRIVERS = ("libcuda.so.1", "nvcuda.dll")


class OnnxSession:
    """A session of ONNX Runtime.

    Args:
        path: the ONNX file.
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime, one a core.
        providers: of ONNX Runtime, the CPU last.

    Raises:
        BuildError: ONNX Runtime refuses the file.
    """

    def __init__(self, path: Path, threads: int, providers: Sequence[Any]) -> None:
        onnxruntime = library()
        self.name, self.runtime, self.device = path.name, f"onnxruntime {onnxruntime.__version__}", "cpu"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised too
        # From memory, so that nothing is read beside what was checked: data outside the file only from its own folder.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            self.session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own, which share no base
            raise BuildError(f"ONNX Runtime refuses {path}: {one_line(error)}", "compile the model again") from error

    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the outputs; see `Session`."""
        try:
            outputs: list[Any] = self.session.run(None, inputs)
        except Exception as error:
            raise BuildError(
                f"ONNX Runtime cannot run {self.name}: {one_line(error)}",
                "give smaller batches where memory is short, and lengths that the model was compiled for",
            ) from error
        return outputs


def open_cpu(folder: Path, manifest: Mapping[str, Any], threads: int) -> OnnxSession:
    """Open the model of a folder on the CPU."""
    return OnnxSession(folder / MODEL, threads, ["CPUExecutionProvider"])


def open_cuda(folder: Path, manifest: Mapping[str, Any], threads: int) -> OnnxSession:
    """Open the model of a folder, in half precision where it was compiled for that, on the first NVIDIA GPU.

    Raises:
        Unavailable: there is none, or ONNX Runtime cannot use it.
    """
    if not count_gpus():
        raise Unavailable("no NVIDIA GPU was found")
    onnxruntime = library()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Unavailable("this ONNX Runtime was built for the CPU alone: install onnxruntime-gpu")
    onnxruntime.preload_dlls()  # CUDA's libraries, where pip installed them
    path = folder / (HALF if HALF in manifest["files"] else MODEL)
    # Products of float32 in TF32 would differ from what was verified.
    session = OnnxSession(path, threads, [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"])
    if session.session.get_providers()[0] != "CUDAExecutionProvider":  # it falls back silently
        raise Unavailable("ONNX Runtime finds no CUDA libraries: install onnxruntime-gpu[cuda,cudnn]")
    session.device = "cuda:0"
    return session


def count_gpus() -> int:
    """Count the NVIDIA GPUs that the driver shows, without any library but the driver's."""
    for name in DRIVERS:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
