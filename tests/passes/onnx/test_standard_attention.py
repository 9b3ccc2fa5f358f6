import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.tolerances import EXPORT
from onnx import TensorProto, helper

from asapc.passes.onnx.standard_attention import DOMAIN, StandardAttention

SHAPES = {"q": (2, 3, 4), "k": (2, 5, 4), "v": (2, 5, 6)}


def model(**attributes):
    attention = helper.make_node("MultiHeadAttention", list(SHAPES), ["a"], domain=DOMAIN, **attributes)
    nodes = [attention, helper.make_node("Relu", ["a"], ["y"])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 3, 6))]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph(nodes, "main", inputs, outputs), opset_imports=opsets, ir_version=9)


def run(program):
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return onnxruntime.InferenceSession(program.SerializeToString()).run(None, feed)[0]


def copy(program):
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(program)
    return rewritten


def test_attention_becomes_standard_operators_that_compute_the_same():
    program = model(num_heads=1, scale=1.0)
    result = StandardAttention()(copy(program))
    assert result.modified
    assert [node.op_type for node in result.program.graph.node] == ["Transpose", "MatMul", "Softmax", "MatMul", "Relu"]
    assert [opset.domain for opset in result.program.opset_import] == [""]
    onnx.checker.check_model(result.program, full_check=True)
    assert np.abs(run(result.program) - run(program)).max() < EXPORT


def test_a_second_run_does_nothing():
    once = StandardAttention()(model(num_heads=1, scale=1.0)).program
    before = once.SerializeToString(deterministic=True)
    again = StandardAttention()(once)
    assert not again.modified
    assert again.program.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "attributes",
    [{"num_heads": 2, "scale": 1.0}, {"num_heads": 1}, {"num_heads": 1, "scale": 1.0, "unidirectional": 1}],
)
def test_attention_of_another_kind_is_left_alone(attributes):
    program = model(**attributes)
    result = StandardAttention()(copy(program))
    assert not result.modified
    assert result.program.SerializeToString(deterministic=True) == program.SerializeToString(deterministic=True)
