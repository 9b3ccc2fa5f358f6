"""Runs a graph and keeps the values of a few of its nodes."""

from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from asapc.types.samples import Samples


class AllRecorded(Exception):  # it ends a run early: what comes after the last value is not computed
    """All values that were asked for are known."""


class Recorder(Interpreter):
    """Interpreter that keeps the values of the named nodes and frees all others as soon as it can.

    Where it `stops` it raises AllRecorded once it has them all.
    """

    def __init__(self, module: nn.Module, names: Collection[str], stops: bool = False) -> None:
        super().__init__(module)
        self.names, self.stops = set(names), stops
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node; its value is kept as it is, since captured graphs write nothing in place."""
        value = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = value
            if self.stops and len(self.values) == len(self.names):
                raise AllRecorded
        return value


def record(module: nn.Module, samples: Samples, names: Collection[str]) -> dict[str, Any]:
    """Return the values of the named nodes, by name, when the module runs on the samples in one batch."""
    recorder = Recorder(module, names, stops=True)
    with torch.no_grad(), suppress(AllRecorded):
        recorder.run(*samples.inputs.values(), enable_io_processing=False)
    return recorder.values


def record_with_outputs(
    module: GraphModule, samples: Samples, names: Collection[str]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return what `record` does, and all tensors that the module returns."""
    recorder = Recorder(module, names)
    with torch.no_grad():
        outputs = recorder.run(*samples.inputs.values(), enable_io_processing=False)
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return recorder.values, [leaf for leaf in leaves if isinstance(leaf, Tensor)]
