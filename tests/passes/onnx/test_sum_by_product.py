"""Sums over few numbers that follow on each other, as TensorRT's compiler gets them."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.tolerances import FLOAT32, difference
from torch import nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.tensorrt.builder import build_engine
from asapc.capturing.export import export
from asapc.passes.onnx.sum_by_product import SumByProduct, summed_axes
from asapc.types.engine import EngineOptions
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

SCORES = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
LOOPS = {
    "sums": lambda p, dim: p / (p.sum(dim, keepdim=True) + 1e-6),
    "sums without their axes": lambda p, dim: p / p.sum(dim).unsqueeze(dim),
    "equations": lambda p, dim: p / torch.einsum("bnij->bnj" if dim == -2 else "bnij->bni", p).unsqueeze(dim),
    "means": lambda p, dim: p / (4 * p.mean(dim, keepdim=True)),
    "norms": lambda p, dim: nn.functional.normalize(p, p=1, dim=dim),
    "Euclidean norms": lambda p, dim: nn.functional.normalize(p, p=2, dim=dim),
    "logarithms": lambda p, dim: (p.log() - p.log().logsumexp(dim, keepdim=True)).exp(),
    "log softmax": lambda p, dim: p.log().log_softmax(dim).exp(),
    "softmax": lambda p, dim: p.softmax(dim),
}


class Loop(nn.Module):
    """Half-steps on small plans, by turns along two axes."""

    def __init__(self, half_step, count, axes=(-2, -1)):
        super().__init__()
        self.half_step, self.count, self.axes = half_step, count, axes

    def forward(self, scores):
        plan = scores.exp()
        for i in range(self.count):
            plan = self.half_step(plan, self.axes[i % 2])
        return plan


def exported(module, path, scores=SCORES):
    samples = Samples({"scores": scores})
    return export_onnx(CapturedGraph(export(module.eval(), samples.inputs), samples), path, {})


def run(model, feed=None):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feed or {"scores": SCORES.numpy()})[0])


def sums(model):
    kinds = ("Sum", "SumExp", "Mean", "L1", "L2", "Einsum", "Softmax")
    return sum(count for kind, count in Counter(n.op_type for n in model.graph.node).items() if kind.endswith(kinds))


@pytest.mark.parametrize("kind", LOOPS)
def test_all_sums_of_a_loop_but_the_first_become_products(kind, tmp_path):
    model = onnx.load(exported(Loop(LOOPS[kind], 7), tmp_path / "model.onnx").path)
    expected = run(model)
    assert SumByProduct()(model).modified
    onnx.checker.check_model(model, full_check=True)
    assert sums(model) == 1
    assert difference(run(model), expected) < FLOAT32
    assert not SumByProduct()(model).modified


@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (-1, 1)])
def test_sums_over_any_axis(axes, tmp_path):
    scores = SCORES.permute(0, 2, 3, 1).contiguous()
    model = onnx.load(exported(Loop(LOOPS["sums"], 5, axes), tmp_path / "model.onnx", scores).path)
    expected = run(model, {"scores": scores.numpy()})
    assert SumByProduct()(model).modified
    assert sums(model) == 1
    assert difference(run(model, {"scores": scores.numpy()}), expected) < FLOAT32


def test_rows_without_any_number_keep_their_sums():
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 17]>
        rows (float[2,4] scores, float[2,4] mask) => (float[2,1] y) {
            shares = Softmax (scores)
            masked = Add (shares, mask)
            y = ReduceLogSumExp <axes = [1]> (masked)
        }""")
    mask = np.array([[0, -np.inf, 0, 0], [-np.inf] * 4], np.float32)
    feed = {"scores": SCORES[0, :2, 0].numpy(), "mask": mask}
    expected = run(model, feed)
    assert SumByProduct()(model).modified
    assert torch.allclose(run(model, feed), expected)
    assert torch.isneginf(expected[1])


def test_sums_over_many_numbers_and_those_with_a_product_between_them_stay(tmp_path):
    class Layers(nn.Module):
        def forward(self, scores):
            return (scores.softmax(-1) @ scores).softmax(-1) @ scores

    large = torch.randn(2, 16, 16)
    for module, scores in ((Layers(), SCORES), (Loop(LOOPS["sums"], 5), large)):
        model = onnx.load(exported(module, tmp_path / "model.onnx", scores).path)
        before = model.SerializeToString()
        assert not SumByProduct()(model).modified
        assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("equation", "axes"),
    [
        ("bij->bi", [-1]),
        ("bij -> bj", [-2]),
        ("...ij->...j", [-2]),
        ("i...->...", []),
        ("bij->bji", []),
        ("bij->b", []),
    ],
)
def test_equations_that_sum_over_one_axis(equation, axes):
    assert summed_axes(equation) == axes


@pytest.mark.parametrize("kind", ["sums", "log softmax"])
def test_a_loop_as_it_was_written_is_built(kind, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    onnx_model = exported(Loop(LOOPS[kind], 39), tmp_path / "model.onnx")
    engine = build_engine(onnx_model, tmp_path / "model.engine", 8, None, "tensorrt-rtx", EngineOptions(("SM89",)))
    assert engine.targets == ("SM89",)
