"""Half-steps on interleaved plans, as TensorRT's compiler gets them."""

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from helpers.tolerances import FLOAT32, difference

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.capturing.export import export
from asapc.ops.small import SmallSinkhorn
from asapc.passes.onnx.split_gemm import SplitGemm
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Floor, Guard

GUARD = Guard(Floor(1e-3, False), Floor(1e-3, False), "plan", "plain", "one", "same")
SCORES = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))


def exported(module, path):
    samples = Samples({"scores": SCORES})
    return onnx.load(export_onnx(CapturedGraph(export(module.eval(), samples.inputs), samples), path, {}).path)


def run(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"scores": SCORES.numpy()})[0])


@pytest.mark.parametrize(("lowering", "split"), [("interleaved", True), ("materialised", False)])
def test_constants_of_interleaved_half_steps_are_added_after_the_reshape(lowering, split, tmp_path):
    module = SmallSinkhorn(7, "columns", (4, 4), GUARD, None, torch.ones(1), lowering)
    model = exported(module, tmp_path / "model.onnx")
    before, expected = Counter(node.op_type for node in model.graph.node), run(model)
    result = SplitGemm()(model)
    assert result.modified == split
    onnx.checker.check_model(model, full_check=True)
    after = Counter(node.op_type for node in model.graph.node)
    assert after["Gemm"] == (0 if split else before["Gemm"])
    assert difference(run(model), expected) < FLOAT32
    assert not SplitGemm()(model).modified


def test_other_products_stay(tmp_path):
    model = exported(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(80, 3)), tmp_path / "model.onnx")
    assert "Gemm" in {node.op_type for node in model.graph.node}
    assert not SplitGemm()(model).modified
