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
        samples: the batch that it runs, on the GPU.
        outputs: of an earlier run; with these it replays a CUDA graph, which saves the time of launches.

    Raises:
        BuildError: ONNX Runtime finds no GPU.
    """

    runtime = "onnxruntime, CUDA"

    def __init__(self, path: Path, samples: Samples, outputs: Sequence[Tensor] | None = None) -> None:
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        provider = {"use_tf32": "0", "enable_cuda_graph": str(int(outputs is not None))}
        providers = [("CUDAExecutionProvider", provider), "CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if self.session.get_providers()[0] != "CUDAExecutionProvider":  # ONNX Runtime falls back silently
            raise BuildError(
                f"ONNX Runtime cannot run {path.name} on a GPU: it finds no CUDA",
                "install onnxruntime-gpu with the CUDA libraries that it names, on a machine with an NVIDIA GPU",
            )
        self.binding = self.session.io_binding()
        self.inputs = {name: tensor.contiguous() for name, tensor in samples.inputs.items()}  # outlives the binding
        for name, tensor in self.inputs.items():
            self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.from_dlpack(tensor))
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
