import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from asapc.passes.onnx.unfuse_attention import UnfuseAttention

MINUS_INFINITY = helper.make_tensor("ninf", TensorProto.DOUBLE, [], [-np.inf])


def value(name, kind=TensorProto.DOUBLE, shape=(2, 3, 3)):
    return helper.make_tensor_value_info(name, kind, shape)


def model(*nodes, outputs=("y", "z")):
    inputs = [value("q"), value("k"), value("v"), value("pad", TensorProto.BOOL, (2, 1, 3))]
    graph = helper.make_graph(list(nodes), "main", inputs, [value(name) for name in outputs], [MINUS_INFINITY])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs.split(), [output], **attributes)


SCORES = node("MatMul", "q k", "s")
MASK = node("Where", "pad ninf s", "m")
KEYS, VALUES = node("Transpose", "k", "kt", perm=[0, 2, 1]), node("Identity", "k", "w")
LOOPS = {
    "keys and values of one tensor": model(
        KEYS,
        VALUES,
        node("MatMul", "q kt", "s"),
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p w", "y"),
        node("Relu", "p", "z"),
    ),
    "softmax": model(
        SCORES,
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p p", "y"),
        node("Relu", "p", "z"),
    ),
    "softmax with a bias": model(
        SCORES,
        node("Add", "s v", "b"),
        node("Softmax", "b", "p", axis=-1),
        node("MatMul", "p p", "y"),
        node("Relu", "p", "z"),
    ),
    "log-softmax": model(
        SCORES,
        node("LogSoftmax", "s", "l", axis=-1),
        node("Exp", "l", "y"),
        node("Neg", "s", "z"),
    ),
    "a kernel that no sum divides": model(
        SCORES,
        node("Exp", "s", "e"),
        node("MatMul", "e v", "y"),
        outputs="y",
    ),
    "a masked kernel, turned": model(
        SCORES,
        MASK,
        node("Transpose", "m", "t", perm=[0, 2, 1]),
        node("Sub", "t v", "d"),
        node("Exp", "d", "e"),
        node("Transpose", "e", "et", perm=[0, 2, 1]),
        node("MatMul", "et v", "y"),
        outputs="y",
    ),
}
OTHERS = {
    "attention": model(
        SCORES,
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p v", "y"),
        outputs="y",
    ),
    "masked attention": model(
        SCORES,
        MASK,
        node("Softmax", "m", "p", axis=-1),
        node("MatMul", "p v", "y"),
        outputs="y",
    ),
    "a product that nothing exponentiates": model(SCORES, MASK, node("Relu", "m", "y"), outputs="y"),
    "an exponential before the product": model(node("Exp", "q", "e"), node("MatMul", "e k", "y"), outputs="y"),
}


def copy(program):
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(program)
    return rewritten


def outputs(program):
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((2, 3, 3)) for name in ("q", "k", "v")}
    feed["pad"] = np.array([[[False, False, True]], [[False, False, False]]])
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: feed[each.name] for each in session.get_inputs()})


def biases(program):
    return sum(each.output[0].endswith("_biased") for each in program.graph.node)


@pytest.mark.parametrize("program", LOOPS.values(), ids=LOOPS)
def test_a_loop_gets_a_bias_of_zero_and_computes_what_it_did(program):
    result = UnfuseAttention()(copy(program))
    assert result.modified
    assert biases(result.program) == 1
    onnx.checker.check_model(result.program, full_check=True)
    for actual, expected in zip(outputs(result.program), outputs(program), strict=True):
        assert np.isfinite(expected).all()
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("program", OTHERS.values(), ids=OTHERS)
def test_what_is_no_loop_stays_as_it_is(program):
    result = UnfuseAttention()(copy(program))
    assert not result.modified
    assert result.program == program


@pytest.mark.parametrize(("query", "biased"), [("q", True), ("k", False)])
def test_keys_that_share_a_tensor_with_values_and_not_with_queries_get_the_zero_too(query, biased):
    product, query_of_it = node("MatMul", "own kt", "s"), node("Identity", query, "own")
    after = node("Softmax", "s", "p", axis=-1), node("MatMul", "p w", "y"), node("Relu", "p", "z")
    program = UnfuseAttention()(model(KEYS, VALUES, query_of_it, product, *after)).program
    (scores,) = [node for node in program.graph.node if "s" in node.output]
    assert (scores.input[1] != "kt") == biased
    assert scores.input[0] == "own"


@pytest.mark.parametrize("first", [np.nan, np.inf, -np.inf, 6e4])
def test_no_number_of_one_sample_reaches_another(first):
    """Whatever the bias reads, also in half precision, it is zero."""
    nodes = [SCORES, node("Exp", "s", "e"), node("MatMul", "e v", "y")]
    values = [value(name, TensorProto.FLOAT16) for name in ("q", "k", "v", "y")]
    graph = helper.make_graph(nodes, "main", values[:3], values[3:])
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    result = UnfuseAttention()(copy(program)).program
    session = onnxruntime.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    q, others = np.zeros((2, 3, 3), np.float16), np.zeros((2, 3, 3), np.float16)
    q[0, 0, 0] = first
    (y,) = session.run(None, {"q": q, "k": others, "v": others})
    assert np.array_equal(y[1], others[1])


def test_a_product_with_a_vector_keeps_its_shape():
    nodes = [SCORES, node("Exp", "s", "y")]
    values = [value("q"), value("k", shape=(3,)), value("y", shape=(2, 3))]
    graph = helper.make_graph(nodes, "main", values[:2], values[2:])
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    result = UnfuseAttention()(copy(program)).program
    onnx.checker.check_model(result, full_check=True)
    session = onnxruntime.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"q": np.ones((2, 3, 3)), "k": np.zeros(3)})[0].shape == (2, 3)


@pytest.mark.parametrize("program", LOOPS.values(), ids=LOOPS)
def test_a_second_run_does_nothing(program):
    once = UnfuseAttention()(copy(program)).program
    again = UnfuseAttention()(copy(once))
    assert not again.modified
    assert again.program == once
