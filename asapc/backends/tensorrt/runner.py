"""Runs an engine as the other backends run their models: torch's tensors in and out, in any number."""

from typing import TYPE_CHECKING, Any

import numpy as np

from asapc.backends.tensorrt.engine import Arrays, Engine

if TYPE_CHECKING:  # whoever serves an engine has no need of torch
    from torch import Tensor

    from asapc.types.samples import Samples


class EngineRunner(Engine):
    """An engine with the interface of `asapc.backends.base.Runner`, and its own clock; see `Engine`."""

    def __call__(self, samples: "Samples") -> "list[Tensor]":
        """Return all outputs for torch tensors, of any number of samples: in parts that the engine takes."""
        import torch

        least, most = self.batches[0], self.batches[-1]
        results: list[Arrays] = []
        for part in samples.batches(most):
            filled = part[[min(i, len(part) - 1) for i in range(max(len(part), least))]]
            results.append({tensor: array[: len(part)] for tensor, array in self.run(self.arrays(filled)).items()})
        return [torch.from_numpy(np.concatenate([part[tensor] for part in results])) for tensor in self.outputs]

    @property
    def batches(self) -> range:
        """The numbers of samples that the engine takes at once."""
        ports = self.inputs.values()
        return range(max(port.low[0] for port in ports), min(port.high[0] for port in ports) + 1)

    def time(self, samples: "Samples") -> float:
        """Return the milliseconds that one batch takes on the GPU, see `milliseconds`."""
        return self.milliseconds(self.arrays(samples))

    def arrays(self, samples: "Samples") -> dict[str, "np.ndarray[Any, Any]"]:
        """Return the engine's inputs as numpy has them; some of the model's may be unused, and are in no engine."""
        return {tensor: samples.inputs[tensor].cpu().numpy() for tensor in self.inputs}
