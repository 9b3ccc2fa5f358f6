"""Graphs with operators, exported with open axes and in half precision: what the files hold, and what it costs."""

import onnx
import onnxruntime
import pytest
import torch
from helpers.slow import slow
from helpers.tolerances import LOGITS
from onnx import TensorProto
from torch import nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.writing.rewrite import rewrite

TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# Relative change of the outputs: a few units in the last place of 11 and 8 bits.
MOST = {"float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module", params=[("float16", "fused"), slow(("bfloat16", "materialised"))], ids=str)
def compiled(request, point_model):
    """A precision, a point-set transformer compiled with an open length and in that precision, and its teacher."""
    precision, lowering = request.param
    teacher, compile_it = point_model
    return precision, compile_it(dynamic="batch=1:8,seq=12:48", precision=precision, lowering=lowering), teacher


def test_the_model_takes_every_length_and_batch(compiled):
    _, report, teacher = compiled
    session = onnxruntime.InferenceSession(str(report.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 12), (3, 24), (2, 48), (5, 31)):
        points = torch.randn(batch, length, 3)
        with torch.no_grad():
            expected = teacher(points)
        actual = torch.from_numpy(session.run(None, {"points": points.numpy()})[0])
        assert (actual - expected).abs().max() < LOGITS


def test_the_open_axes_have_their_names(compiled):
    shape = onnx.load(compiled[1].folder / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", "seq", 3]


def test_sites_are_lowered_as_asked(compiled):
    _, report, _ = compiled
    graph = onnx.load(report.folder / "model.onnx").graph
    fused = any(node.op_type == "MultiHeadAttention" for node in graph.node)
    assert {site["choice"]["lowering"] == "fused" for site in report.data["sites"]} == {fused}
    assert (report.folder / "model.engine").stat().st_size > 1000


def hop(report, name):
    return next(hop for hop in report.data["fidelity"]["hops"] if hop["name"] == name)


def test_a_second_file_is_written_and_the_engine_built_from_it(compiled):
    precision, report, _ = compiled
    names = [artifact["path"] for artifact in report.data["artifacts"] if artifact["kind"] == "onnx"]
    assert names == ["model.onnx", f"model.{precision}.onnx"]
    assert (report.folder / "model.engine").stat().st_size > 1000


def test_weights_of_layers_are_in_half_precision_and_what_goes_in_and_out_is_not(compiled):
    precision, report, _ = compiled
    half = onnx.load(report.folder / f"model.{precision}.onnx")
    onnx.checker.check_model(half, full_check=True)
    kinds = {tensor.data_type for tensor in half.graph.initializer if len(tensor.dims) == 2 and 16 in tensor.dims}
    assert TYPES[precision] in kinds
    for value in (*half.graph.input, *half.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_outputs_have_the_same_names_in_both_files(compiled):
    precision, report, _ = compiled
    single, half = (onnx.load(report.folder / name) for name in ("model.onnx", f"model.{precision}.onnx"))
    assert [value.name for value in half.graph.output] == [value.name for value in single.graph.output]


def test_exponentials_are_in_float32(compiled):
    precision, report, _ = compiled
    half = onnx.shape_inference.infer_shapes(onnx.load(report.folder / f"model.{precision}.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in half.graph.value_info}
    # A fused pass is left to TensorRT with its softmax; of the graph's own softmax the kernel is made.
    own = {"Exp", "Log", "Reciprocal", *(["Softmax"] if precision == "bfloat16" else [])}
    actual = [types[node.output[0]] for node in half.graph.node if node.op_type in own]
    assert actual
    assert set(actual) == {TensorProto.FLOAT}


def test_what_it_costs_has_a_hop_of_its_own(compiled):
    precision, report, _ = compiled
    assert 0 < hop(report, "precision")["rel"] < MOST[precision]
    assert hop(report, "export")["rel"] < 1e-5
    assert report.data["fidelity"]["agreement"] >= 0.98


class Loop(nn.Module):
    """A loop with a cast of its own, on a matrix to which automatic casts lead within a composite product."""

    def __init__(self, product):
        super().__init__()
        self.product = product
        self.register_buffer("weight", torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 20)

    def forward(self, x):
        scores = self.product(x.exp(), x @ self.weight, self.weight).float()
        for _ in range(2):
            scores = scores.log_softmax(-2).log_softmax(-1)
        return scores.exp() @ x


# Each of a factor in float32, as an exponential leaves it, and of one in half precision, as a product does.
PRODUCTS = {
    "matmul": lambda wide, narrow, weight: wide @ narrow,
    "einsum": lambda wide, narrow, weight: torch.einsum("bij,bjk->bik", wide, narrow),
    "tensordot": lambda wide, narrow, weight: torch.tensordot(wide, narrow[0], ([2], [0])),
    "inner": lambda wide, narrow, weight: torch.inner(wide, narrow[0]),
    "multi_dot": lambda wide, narrow, weight: wide + torch.linalg.multi_dot([wide[0], narrow[0], weight]),
    "bilinear": lambda wide, narrow, weight: nn.functional.bilinear(wide, narrow, weight[..., None] * weight),
    "lerp": lambda wide, narrow, weight: torch.lerp(wide, narrow, 0.5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_loops_that_stay_are_exported_in_half_precision(name, tmp_path):
    samples = Samples({"x": torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))})
    module = Loop(PRODUCTS[name])
    half = rewrite(CapturedGraph(export(module, samples.inputs), samples), [], {}, torch.float16)
    (actual,) = OnnxRuntimeRunner(export_onnx(half, tmp_path / "model.onnx", {}, standard=True).path)(samples)
    expected = module(**samples.inputs)
    assert 0 < (actual - expected).abs().max() / expected.abs().max() < MOST["float16"]


def test_other_precisions_are_refused():
    with pytest.raises(OptionError):
        CompileConfig(precision="int8")
