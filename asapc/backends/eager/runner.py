"""Runs a model in PyTorch."""

import torch
from torch import Tensor, nn

from asapc.loading.inputs import arguments
from asapc.types.samples import Samples


class EagerRunner:
    """Runs a module in PyTorch: a model as loaded, or a captured graph as a module."""

    runtime = "torch"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, samples: Samples) -> list[Tensor]:
        """Return all tensor outputs of the model for one batch, in its order."""
        args, kwargs = arguments(self.module, samples.inputs)
        with torch.no_grad():
            outputs = self.module(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves(outputs)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
