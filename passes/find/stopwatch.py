"""Times the nodes of a graph, from which the share of a site in the model's time follows."""

import time
from typing import Any

import torch
from torch import nn
from torch.fx import Interpreter, Node

from asapc.types.samples import Samples

# Runs after the first, and the seconds after which no other is begun.
MAX_RUNS, MAX_SECONDS = 4, 1.0


class NodeTimer(Interpreter):
    """Runs a graph and keeps the least time of each node."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.seconds: dict[Node, float] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        start = time.perf_counter()
        value = super().run_node(n)
        seconds = time.perf_counter() - start
        self.seconds[n] = min(seconds, self.seconds.get(n, seconds))
        return value


def time_nodes(module: nn.Module, samples: Samples, first: dict[Node, float]) -> dict[Node, float]:
    """Return the seconds that each node takes: the least of several runs.

    Args:
        module: the graph.
        samples: its inputs.
        first: the seconds of a first run, which allocates memory and wakes threads: where it is long it counts, and
            alone, else not at all.
    """
    if sum(first.values()) > MAX_SECONDS:
        return first
    timer = NodeTimer(module)
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(MAX_RUNS):
            timer.run(*samples.inputs.values(), enable_io_processing=False)
            if time.perf_counter() - start > MAX_SECONDS:
                break
    return timer.seconds
