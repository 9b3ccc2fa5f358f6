"""Nodes are timed by a clock that tests set themselves."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from asapc.passes.find import stopwatch
from asapc.passes.find.stopwatch import MAX_RUNS, NodeTimer, time_nodes
from asapc.types.samples import Samples

now = 0.0


class Takes(nn.Module):
    """Does nothing, for as long as it is told, call by call."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.seconds = iter(seconds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global now
        now += next(self.seconds)
        return x


def least_times(monkeypatch: pytest.MonkeyPatch, *seconds: list[float]) -> list[float]:
    """Time one node for each list of the seconds that it takes, run by run."""
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    graph = Graph()
    node = x = graph.placeholder("x")
    nodes = [node := graph.call_module(str(number), (node,)) for number in range(len(seconds))]
    graph.output(node)
    module = GraphModule({str(number): Takes(times) for number, times in enumerate(seconds)}, graph)
    first = NodeTimer(module)
    first.run(torch.ones(1))
    timed = time_nodes(module, Samples({"x": torch.ones(1)}), first.seconds)
    assert timed[x] == 0
    return [timed[node] for node in nodes]


def test_the_least_of_all_runs_but_the_first_counts(monkeypatch):
    one, other = [0.01, 0.04, 0.02, 0.05, 0.06], [0.3, 0.1, 0.2, 0.1, 0.3]
    assert len(one) == 1 + MAX_RUNS
    assert least_times(monkeypatch, one, other) == pytest.approx([0.02, 0.1])


def test_a_first_run_that_is_long_is_the_only_one(monkeypatch):
    assert least_times(monkeypatch, [3.0], [1.0]) == pytest.approx([3.0, 1.0])


def test_no_run_is_begun_after_the_time_is_up(monkeypatch):
    assert least_times(monkeypatch, [0.2, 0.5, 0.6]) == pytest.approx([0.5])
