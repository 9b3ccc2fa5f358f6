"""Engines in half precision: what the file holds, and what that costs in fidelity."""

import onnx
import pytest
from onnx import TensorProto

from asapc.config import CompileConfig
from asapc.errors import OptionError

TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# Relative change of the outputs: a few units in the last place of 11 and 8 bits.
MOST = {"float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module", params=[("float16", "fused"), ("bfloat16", "materialised")], ids=str)
def compiled(request, point_model):
    precision, lowering = request.param
    return precision, point_model[1](precision=precision, lowering=lowering)


def hop(report, name):
    return next(hop for hop in report.data["fidelity"]["hops"] if hop["name"] == name)


def test_a_second_file_is_written_and_the_engine_built_from_it(compiled):
    precision, report = compiled
    names = [artifact["path"] for artifact in report.data["artifacts"] if artifact["kind"] == "onnx"]
    assert names == ["model.onnx", f"model.{precision}.onnx"]
    assert (report.folder / "model.engine").stat().st_size > 1000


def test_weights_of_layers_are_in_half_precision_and_what_goes_in_and_out_is_not(compiled):
    precision, report = compiled
    full, half = (onnx.load(report.folder / name) for name in ("model.onnx", f"model.{precision}.onnx"))
    onnx.checker.check_model(half, full_check=True)
    kinds = {tensor.data_type for tensor in half.graph.initializer if len(tensor.dims) == 2 and 16 in tensor.dims}
    assert TYPES[precision] in kinds
    assert half.ByteSize() < full.ByteSize()
    for value in (*half.graph.input, *half.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_exponentials_are_in_float32(compiled):
    precision, report = compiled
    half = onnx.shape_inference.infer_shapes(onnx.load(report.folder / f"model.{precision}.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in half.graph.value_info}
    seen = [types[node.output[0]] for node in half.graph.node if node.op_type in ("Softmax", "Exp", "Reciprocal")]
    assert seen
    assert set(seen) == {TensorProto.FLOAT}


def test_what_it_costs_has_a_hop_of_its_own(compiled):
    precision, report = compiled
    assert 0 < hop(report, "precision")["rel"] < MOST[precision]
    assert hop(report, "export")["rel"] < 1e-5
    assert report.data["fidelity"]["agreement"] >= 0.98


def test_other_precisions_are_refused():
    with pytest.raises(OptionError):
        CompileConfig(precision="int8")
