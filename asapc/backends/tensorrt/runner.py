"""Runs an engine as the other backends run their models: torch's tensors in and out, in any number."""

from typing import TYPE_CHECKING, Any

import numpy as np

from asapc.backends.tensorrt.engine import Engine

if TYPE_CHECKING:  # whoever serves an engine has no need of torch
    from torch import Tensor

    from asapc.types.samples import Samples


class EngineRunner(Engine):
    """An engine with the interface of `asapc.backends.base.Runner`, and its own clock; see `Engine`."""

    def __call__(self, samples: "Samples") -> "list[Tensor]":
        """Return all outputs for torch tensors, of any number of samples: in parts that the engine takes."""
        import torch

        results = self.run_in_parts(self.arrays(samples))
        return [torch.from_numpy(results[tensor]) for tensor in self.outputs]

    def time(self, samples: "Samples") -> float:
        """Return the milliseconds that one batch takes on the GPU, see `milliseconds`."""
        return self.milliseconds(self.arrays(samples))

    def arrays(self, samples: "Samples") -> dict[str, "np.ndarray[Any, Any]"]:
        """Return the engine's inputs as numpy has them; some of the model's may be unused, and are in no engine."""
        return {tensor: samples.inputs[tensor].cpu().numpy() for tensor in self.inputs}
