"""Runs an ONNX file in ONNX Runtime on the CPU."""

from pathlib import Path

import torch
from torch import Tensor

from asapc.artifacts import Samples


class OnnxRuntimeRunner:
    """A session on the CPU provider, named outright: ONNX Runtime falls back to the CPU without a word.

    Args:
        path: the ONNX file.
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime (one a core).
    """

    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Several sessions live side by side while latency is measured. Idle threads of one, spinning, would take
        # the cores from the one that is timed.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, samples: Samples) -> list[Tensor]:
        """All outputs for one batch."""
        feed = {name: value.numpy() for name, value in samples.inputs.items() if name in self.names}
        return [torch.from_numpy(value) for value in self.session.run(None, feed)]
