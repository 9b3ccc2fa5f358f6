"""Operations that the exporter has no form of, written as others."""

from dataclasses import replace
from math import inf

import onnx
import pytest
import torch
from helpers.tolerances import EXPORT, difference
from torch import nn

from asapc.backends.onnxruntime.builder import export_onnx, trace_alone
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.types.graph import CapturedGraph, DynamicAxis
from asapc.types.samples import Samples


class Composed(nn.Module):
    """Operations that have no ONNX form of their own, one of them with two results, at sizes that are open."""

    def forward(self, points):
        low, high = torch.aminmax(points, dim=-1, keepdim=True)
        mask = (points > 0).to(points.dtype)
        return (1 - mask) * (points.mT @ (high - low) + torch.addcdiv(low, high, low - 9).sum(1, keepdim=True)).mT


class MadeOfConstants(nn.Module):
    """Operations that torch decomposes into writes in place and constants."""

    def forward(self, points):
        positive = nn.functional.one_hot((points > 0).long(), 2).to(points.dtype)
        return torch.diag_embed(points).sum(1) @ torch.eye(6) + positive.mT.sum((1, 2))[:, :1, None]


@pytest.mark.parametrize(("kind", "alone"), [(Composed, True), (MadeOfConstants, False)])
def test_operations_without_a_form_of_their_own_are_decomposed_one_by_one_or_all_at_once(kind, alone, tmp_path):
    points = torch.randn(4, 6, 6)
    axes = {"points": {0: DynamicAxis("batch", 1, 8)}}
    program = export(kind(), {"points": points}, axes)
    table = torch.export.default_decompositions()
    traced = [trace_alone(node, table) for node in program.graph.nodes if node.target in table]
    assert (None not in traced) == alone
    assert traced
    graph = CapturedGraph(program, Samples({"points": points}), axes=axes)
    run = OnnxRuntimeRunner(export_onnx(graph, tmp_path / "model.onnx", {}).path)
    for batch in (1, 3, 4):
        part = Samples({"points": points[:batch]})
        assert difference(run(part)[0], kind()(points[:batch])) < EXPORT
    operations = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Einsum" not in operations  # how the exporter writes the transposition


IF_NECESSARY, ALWAYS, NEVER = (
    "use_mm_for_euclid_dist_if_necessary",
    "use_mm_for_euclid_dist",
    "donot_use_mm_for_euclid_dist",
)


@pytest.mark.parametrize(
    ("p", "mode", "length"),
    [*((p, IF_NECESSARY, 5) for p in (0, 1, 2, 3, inf)), (2, IF_NECESSARY, 40), (2, ALWAYS, 5), (2, NEVER, 40)],
)
def test_distances_are_those_of_torch(p, mode, length, tmp_path):
    class Distances(nn.Module):
        def forward(self, left, right):
            return torch.cdist(left, right, p=float(p), compute_mode=mode)

    inputs = {"left": torch.randn(3, 2, length, 4), "right": torch.randn(3, 1, 7, 4)}
    captured = CapturedGraph(export(Distances(), inputs), Samples(inputs))
    if mode == NEVER:  # and as of an archive, which may be decomposed
        captured = replace(captured, program=captured.program.run_decompositions())
    run = OnnxRuntimeRunner(export_onnx(captured, tmp_path / "model.onnx", {}).path)
    left, right = (value.double() for value in inputs.values())
    expected = torch.linalg.vector_norm(left.unsqueeze(-2) - right.unsqueeze(-3), p, dim=-1)
    assert difference(run(Samples(inputs))[0], expected) < EXPORT
