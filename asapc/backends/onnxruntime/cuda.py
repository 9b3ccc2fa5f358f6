"""Runs an ONNX file in ONNX Runtime on an NVIDIA GPU, one batch, without copies to and from it."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.utils.dlpack
from torch import Tensor

from asapc.backends.onnxruntime.library import library
from asapc.errors import BuildError
from asapc.types.samples import Samples


class CudaRunner:
    """A session on the CUDA provider that reads and returns tensors in the GPU's memory; float32 products without TF32.

    Args:
        path: the ONNX file.
        samples: the batch that it runs, which is moved to the GPU.
        outputs: of an earlier run; with these it replays a CUDA graph, which saves the time of launches.

    Raises:
        BuildError: ONNX Runtime finds no GPU.
    """

    runtime = "onnxruntime, CUDA"

    def __init__(self, path: Path, samples: Samples, outputs: Sequence[Tensor] | None = None) -> None:
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if torch.cuda.is_available():
            # A stream of our own, since events on another one would not wait for the session.
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            provider = {
                "use_tf32": "0",
                "enable_cuda_graph": str(int(outputs is not None)),
                "user_compute_stream": str(self.stream.cuda_stream),
            }
            providers = [("CUDAExecutionProvider", provider), "CPUExecutionProvider"]
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if not torch.cuda.is_available() or self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise BuildError(  # ONNX Runtime falls back silently
                f"ONNX Runtime cannot run {path.name} on a GPU: it finds no CUDA",
                "install onnxruntime-gpu with the CUDA libraries that it names, on a machine with an NVIDIA GPU",
            )
        if outputs is not None:
            self.runtime = "onnxruntime, CUDA graph"
        self.device = torch.cuda.get_device_name()
        self.unwaited = onnxruntime.RunOptions()
        self.unwaited.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.binding = self.session.io_binding()
        # They outlive the binding.
        self.inputs = {name: tensor.to("cuda").contiguous() for name, tensor in samples.inputs.items()}
        for name, tensor in self.inputs.items():
            self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.from_dlpack(tensor))
        torch.cuda.synchronize()  # they were written on another stream
        self.outputs = None if outputs is None else [torch.empty_like(output) for output in outputs]
        for number, output in enumerate(self.session.get_outputs()):
            if self.outputs is None:
                self.binding.bind_output(output.name, "cuda")
            else:
                self.binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.from_dlpack(self.outputs[number]))

    def __call__(self, samples: Samples) -> list[Tensor]:
        """Return all outputs for the batch that is bound."""
        self.session.run_with_iobinding(self.binding)
        return self.outputs or [torch.utils.dlpack.from_dlpack(value) for value in self.binding.get_outputs()]

    def time(self, samples: Samples) -> float:
        """Return the milliseconds that one run of the batch that is bound takes on the GPU, between two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(self.stream)
        self.session.run_with_iobinding(self.binding, self.unwaited)
        end.record(self.stream)
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds
