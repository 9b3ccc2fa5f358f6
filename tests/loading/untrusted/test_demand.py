"""Graphs that ask for more than their files warrant are refused before anything is allocated."""

import onnx
import pytest
import torch
from helpers.hostile import export
from onnx import TensorProto, helper
from torch import nn

from asapc.capturing.onnx import check_memory
from asapc.errors import CheckpointError
from asapc.loading.model import load_model
from asapc.loading.untrusted.demand import MAX_CONSTANTS_BYTES, MAX_NODES, Demand
from asapc.loading.untrusted.source import Source
from asapc.types.samples import Samples

COUNT, SIZE = 40, 2**26  # numbers of float32: each a quarter of what all may take


class ManyConstants(nn.Module):
    """Twice what `test_many_constants_of_an_archive_are_summed_first` allows, in constants of half of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(4):
            x = x + torch.full((2**17,), float(number)).sum()
        return x


def onnx_file(path, nodes, last, **initializers):
    stored = [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in initializers.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("v0", last)]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_many_constants_of_an_onnx_file_are_summed_first(tmp_path):
    nodes = []
    for i in range(COUNT):
        nodes.append(helper.make_node("ConstantOfShape", ["size"], [f"c{i}"]))
        nodes.append(helper.make_node("ReduceSum", [f"c{i}"], [f"r{i}"]))
        nodes.append(helper.make_node("Add", [f"v{i}", f"r{i}"], [f"v{i + 1}"]))
    loaded = load_model(onnx_file(tmp_path / "many.onnx", nodes, f"v{COUNT}", size=SIZE))
    with pytest.raises(CheckpointError, match="computes constants"):
        check_memory(loaded.module, Samples({"v0": torch.rand(2, 4)}))


def test_many_constants_of_an_archive_are_summed_first(tmp_path, monkeypatch):
    path = tmp_path / "many.pt2"
    monkeypatch.setattr("asapc.loading.untrusted.demand.MAX_CONSTANTS_BYTES", 2**20)
    with pytest.raises(CheckpointError, match="computes constants"):
        load_model(export(path, ManyConstants()))


def test_a_long_chain_is_refused(tmp_path):
    nodes = [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(MAX_NODES + 1)]
    with pytest.raises(CheckpointError, match="runs more than"):
        load_model(onnx_file(tmp_path / "chain.onnx", nodes, f"v{len(nodes)}"))


def test_constants_are_allowed_what_their_file_warrants(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    demand = Demand(Source.at(tmp_path / "file", CheckpointError))
    demand.add_constant(MAX_CONSTANTS_BYTES)
    with pytest.raises(CheckpointError):
        demand.add_constant(1)
