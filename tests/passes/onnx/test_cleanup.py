import onnx
import pytest
from onnx import TensorProto, helper

from asapc.passes.base import PostconditionError
from asapc.passes.onnx.cleanup import OnnxCleanup

TRACE = "/home/user/secret/model.py:7"
METADATA = {"asapc.version": "1.2.3", "asapc.source_sha256": "ab" * 32}


def value(name, kind=TensorProto.FLOAT, shape=(2, 3)):
    return helper.make_tensor_value_info(name, kind, shape)


def scalar(name, kind, number):
    return helper.make_tensor(name, kind, [], [number])


def loop_body():
    """One turn of a Loop that applies Relu to what it carries."""
    nodes = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Relu", ["carried"], ["turned"])]
    inputs = [value("turn", TensorProto.INT64, ()), value("go", TensorProto.BOOL, ()), value("carried")]
    return helper.make_graph(nodes, "body", inputs, [value("go_on", TensorProto.BOOL, ()), value("turned")])


def branch(name, nodes, **graph):
    return helper.make_graph(nodes, name, [], [value(f"{name}_out")], **graph)


def bare_model():
    """y = If(flag, Loop of Relu over x + one, Twice(x)): every place that a graph can hide in."""
    loop = helper.make_node("Loop", ["turns", "", "x"], ["then_out"], body=loop_body())
    then = branch("then", [loop], initializer=[scalar("turns", TensorProto.INT64, 3)])
    other = branch("else", [helper.make_node("Twice", ["x"], ["else_out"], domain="own")])
    nodes = [
        helper.make_node("Add", ["x", "one"], ["sum"]),
        helper.make_node("If", ["flag"], ["chosen"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["sum", "chosen"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [value("x"), value("flag", TensorProto.BOOL, ())],
        [value("y")],
        initializer=[scalar("one", TensorProto.FLOAT, 1.0)],
        value_info=[value("sum")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    # The function holds a subgraph of its own.
    inner = [
        helper.make_node("Constant", [], ["yes"], value=scalar("yes", TensorProto.BOOL, True)),
        helper.make_node(
            "If",
            ["yes"],
            ["b"],
            then_branch=branch("then", [helper.make_node("Add", ["a", "a"], ["then_out"])]),
            else_branch=branch("else", [helper.make_node("Relu", ["a"], ["else_out"])]),
        ),
    ]
    twice = helper.make_function("own", "Twice", ["a"], ["b"], inner, opsets[:1])
    twice.value_info.append(value("b"))
    return helper.make_model(graph, functions=[twice], opset_imports=opsets, ir_version=10)


def attribute_graph(node, name):
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def then_branch(model):
    return attribute_graph(model.graph.node[1], "then_branch")


def body(model):
    return attribute_graph(then_branch(model).node[0], "body")


PLACES = {
    "model": lambda m: m,
    "graph": lambda m: m.graph,
    "node": lambda m: m.graph.node[0],
    "attribute": lambda m: m.graph.node[1].attribute[0],
    "initializer": lambda m: m.graph.initializer[0],
    "input": lambda m: m.graph.input[0],
    "output": lambda m: m.graph.output[0],
    "value": lambda m: m.graph.value_info[0],
    "If branch": then_branch,
    "node in an If branch": lambda m: then_branch(m).node[0],
    "initializer in an If branch": lambda m: then_branch(m).initializer[0],
    "Loop body in an If branch": body,
    "node in a Loop body": lambda m: body(m).node[1],
    "input of a Loop body": lambda m: body(m).input[0],
    "function": lambda m: m.functions[0],
    "node in a function": lambda m: m.functions[0].node[0],
    "value in a function": lambda m: m.functions[0].value_info[0],
    "If branch in a function": lambda m: attribute_graph(m.functions[0].node[1], "then_branch"),
    "node in an If branch in a function": lambda m: attribute_graph(m.functions[0].node[1], "then_branch").node[0],
}


@pytest.fixture
def model():
    """The bare model with a trace of the machine in every place."""
    traced = bare_model()
    for place in PLACES.values():
        leave_trace(place(traced))
    return traced


def leave_trace(item):
    item.doc_string = TRACE
    if hasattr(item, "metadata_props"):
        item.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=TRACE)


def has_trace(model):
    return TRACE.encode() in model.SerializeToString()


@pytest.mark.parametrize("place", PLACES)
def test_no_trace_of_the_machine_is_left(place):
    model = bare_model()
    leave_trace(PLACES[place](model))
    assert has_trace(model)
    assert not has_trace(OnnxCleanup(METADATA)(model).program)


def test_the_model_says_where_it_comes_from_and_nothing_else(model):
    cleaned = OnnxCleanup(METADATA)(model).program
    assert {entry.key: entry.value for entry in cleaned.metadata_props} == METADATA


def test_what_the_model_computes_is_left_as_it_was():
    expected = bare_model()
    helper.set_model_props(expected, METADATA)
    assert OnnxCleanup(METADATA)(bare_model()).program == expected


def test_the_cleaned_model_passes_the_checker(model):
    onnx.checker.check_model(OnnxCleanup(METADATA)(model).program, full_check=True)


def test_modified_is_true_when_something_was_cleaned_and_false_on_the_second_run(model):
    clean = OnnxCleanup(METADATA)
    first = clean(model)
    assert first.modified is True
    second = clean(first.program)
    assert second.modified is False
    assert second.program == first.program


def test_new_metadata_alone_is_a_modification():
    cleaned = OnnxCleanup(METADATA)(bare_model())
    assert cleaned.modified is True
    assert OnnxCleanup({"asapc.version": "2"})(cleaned.program).modified is True
    assert OnnxCleanup({})(bare_model()).modified is False


def test_the_model_given_is_not_changed(model):
    before = model.SerializeToString(deterministic=True)
    OnnxCleanup(METADATA)(model)
    assert model.SerializeToString(deterministic=True) == before


def test_models_that_differ_in_traces_alone_become_equal(model):
    clean = OnnxCleanup(METADATA)
    assert clean(model).program == clean(bare_model()).program


def simple(node, output_shape):
    graph = helper.make_graph([node], "main", [value("x")], [value("y", shape=output_shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    "invalid",
    [
        pytest.param(simple(helper.make_node("Relu", ["nowhere"], ["y"]), (2, 3)), id="an input that nothing gives"),
        pytest.param(simple(helper.make_node("Relux", ["x"], ["y"]), (2, 3)), id="an unknown operator"),
        pytest.param(simple(helper.make_node("Relu", ["x"], ["y"]), (4, 5)), id="a wrong output shape"),
        pytest.param(simple(helper.make_node("MatMul", ["x", "x"], ["y"]), (2, 3)), id="shapes that do not fit"),
    ],
)
def test_an_invalid_model_breaks_the_promise(invalid):
    with pytest.raises(PostconditionError):
        OnnxCleanup(METADATA)(invalid)
