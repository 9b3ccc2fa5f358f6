"""Runs an ONNX file in ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asapc.backends.onnxruntime.library import library
from asapc.errors import BuildError, one_line
from asapc.types.model import InputType
from asapc.types.samples import Samples

# What ONNX Runtime calls the types of inputs.
DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(uint16)": torch.uint16,
    "tensor(uint32)": torch.uint32,
    "tensor(uint64)": torch.uint64,
    "tensor(bool)": torch.bool,
}


class OnnxRuntimeRunner:
    """A session on the CPU provider, named explicitly, since ONNX Runtime falls back silently.

    Args:
        path: the ONNX file.
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime (one per core).
        name: what messages call the model; None for the file's name.

    Raises:
        BuildError: ONNX Runtime refuses the file.
    """

    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int = 0, name: str | None = None) -> None:
        onnxruntime = library()
        self.path, self.threads, self.name = path, threads, name or path.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # fatal only: errors are raised too, and the caller shows them
        # Several sessions live side by side while latency is measured. Idle threads of one, spinning, would take
        # the cores from the one that is timed.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own, which share no base
            lacks = type(error).__name__ == "NotImplemented"  # bfloat16, for one
            hint = "compile the model in float32" if lacks else "report the model"
            raise BuildError(f"ONNX Runtime refuses {self.name}: {one_line(error)}", hint) from error
        self.inputs = {
            value.name: InputType((None, *(n if isinstance(n, int) else None for n in sizes)), DTYPES[value.type])
            for value in self.session.get_inputs()
            for _, *sizes in [value.shape]
        }
        self.outputs = [value.name for value in self.session.get_outputs()]

    def reopen(self) -> "OnnxRuntimeRunner":
        """Return another session of the same file."""
        return OnnxRuntimeRunner(self.path, self.threads, self.name)

    @staticmethod
    def dtype(value: Any) -> str:
        """Return the dtype of an input or output of a session, as numpy calls it."""
        return str(DTYPES[value.type]).removeprefix("torch.")

    def __call__(self, samples: Samples) -> list[Tensor]:
        """Return all outputs for one batch.

        Raises:
            BuildError: ONNX Runtime cannot compute them.
        """
        try:
            feed = {name: value.numpy() for name, value in samples.inputs.items() if name in self.inputs}
            return [torch.from_numpy(value) for value in self.session.run(None, feed)]
        except Exception as error:
            raise BuildError(
                f"ONNX Runtime cannot run {self.name} at batch {len(samples)}: {one_line(error)}",
                "measure smaller batches with --batch where memory is short, else report the model",
            ) from error
