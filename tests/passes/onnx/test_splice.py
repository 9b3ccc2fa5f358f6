"""What goes from an ONNX file with the loop that an operator replaces, and what stays."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from asapc.passes.onnx.splice import Piece, SpliceOnnx


def value(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [3])


def model_of(nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "graph", [value(name) for name in inputs], [value(name) for name in outputs])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def node(kind, source, result):
    return helper.make_node(kind, [source], [result], result)


def branch(source, result):
    """A node that reads a value from within its inner graphs alone."""
    inner = helper.make_graph([node("Neg", source, f"{result}_inner")], "inner", [], [value(f"{result}_inner")])
    other = helper.make_graph([node("Neg", "x", f"{result}_other")], "other", [], [value(f"{result}_other")])
    return helper.make_node("If", ["condition"], [result], result, then_branch=inner, else_branch=other)


CONDITION = helper.make_node(
    "Constant", [], ["condition"], "condition", value=helper.make_tensor("c", TensorProto.BOOL, [], [True])
)
LOOP = [node("Exp", "x", "loop"), node("Abs", "loop", "plan")]
PIECE = Piece("site", model_of([node("Exp", "a", "b")], ["a"], ["b"]), ("x",), ("plan",))


def spliced(*useless):
    """A file with more nodes than its output needs, and what is left of it."""
    before = model_of([CONDITION, *LOOP, node("Neg", "plan", "y"), *useless], ["x"], ["y"])
    onnx.checker.check_model(before)
    result = SpliceOnnx([PIECE], {}, {})(before)
    assert result.modified
    x = np.array([-1.0, 0.0, 2.0], dtype=np.float32)
    expected, actual = (ReferenceEvaluator(model).run(None, {"x": x})[0] for model in (before, result.program))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    return before, result.program


def names(model):
    return [node.name for node in model.graph.node]


def test_the_loop_goes_and_the_operator_stands_in_its_place():
    _, after = spliced()
    assert names(after) == ["condition", "asapc/site/b", "y"]


@pytest.mark.parametrize("reads", [node, lambda kind, *names: branch(*names)], ids=["itself", "within"])
def test_a_useless_node_that_reads_the_loop_goes_with_it_and_so_does_what_reads_that(reads):
    _, after = spliced(reads("Neg", "loop", "useless"), reads("Neg", "useless", "more"))
    assert names(after) == ["condition", "asapc/site/b", "y"]


@pytest.mark.parametrize("reads", ["x", "plan", "y"])
def test_a_useless_node_that_reads_what_is_still_there_stays_as_it_is(reads):
    before, after = spliced(node("Neg", reads, "useless"), node("Sqrt", "useless", "more"))
    assert names(after) == ["condition", "asapc/site/b", "y", "useless", "more"]
    assert list(after.graph.node)[-2:] == list(before.graph.node)[-2:]
