import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from asapc.passes.onnx.unfuse_attention import UnfuseAttention


def value(name, shape=(2, 3, 3)):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(*nodes, outputs=("y", "z")):
    graph = helper.make_graph(list(nodes), "main", [value("q"), value("k")], [value(name) for name in outputs])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


SCORES = helper.make_node("MatMul", ["q", "k"], ["s"])
LOOP = model(
    SCORES,
    helper.make_node("Softmax", ["s"], ["p"], axis=-1),
    helper.make_node("MatMul", ["p", "p"], ["y"]),
    helper.make_node("Relu", ["p"], ["z"]),
)
SPELLED_OUT = model(
    SCORES,
    helper.make_node("LogSoftmax", ["s"], ["l"], axis=-1),
    helper.make_node("Exp", ["l"], ["y"]),
    helper.make_node("Neg", ["s"], ["z"]),
)
ATTENTION = model(
    SCORES,
    helper.make_node("Softmax", ["s"], ["p"], axis=-1),
    helper.make_node("MatMul", ["p", "k"], ["y"]),
    outputs="y",
)
BIASED = model(
    SCORES,
    helper.make_node("Add", ["s", "k"], ["b"]),
    helper.make_node("Softmax", ["b"], ["p"], axis=-1),
    helper.make_node("MatMul", ["p", "p"], ["y"]),
    helper.make_node("Relu", ["p"], ["z"]),
)


def copy(program):
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(program)
    return rewritten


def outputs(program):
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((2, 3, 3)).astype(np.float32) for name in ("q", "k")}
    return ReferenceEvaluator(program).run(None, feed)


@pytest.mark.parametrize("program", [LOOP, SPELLED_OUT], ids=["softmax", "spelled out"])
def test_a_loop_gets_a_bias_of_zero_and_computes_what_it_did(program):
    result = UnfuseAttention()(copy(program))
    assert result.modified
    onnx.checker.check_model(result.program, full_check=True)
    for actual, expected in zip(outputs(result.program), outputs(program), strict=True):
        assert np.array_equal(actual, expected)
    assert sum(node.op_type == "Add" for node in result.program.graph.node) == 1


@pytest.mark.parametrize("program", [ATTENTION, BIASED], ids=["attention", "biased"])
def test_what_is_no_danger_stays_as_it_is(program):
    result = UnfuseAttention()(copy(program))
    assert not result.modified
    assert result.program == program


def test_a_second_run_does_nothing():
    once = UnfuseAttention()(copy(LOOP)).program
    again = UnfuseAttention()(copy(once))
    assert not again.modified
    assert again.program == once
