import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.tolerances import EXPORT

from asapc.passes.onnx.inline_attention import InlineAttention

# What computes y, of queries of 3 tokens, and keys and values of 5.
CALLS = {
    "plain": "[it] y = Attention(q, k, v)",
    "of a scale": "[it] y = Attention<scale=0.5>(q, k, v)",
    "causal": "[it] y = Attention<is_causal=1>(q, k, v)",
    "masked": "[it] y = Attention(q, k, v, mask)",
    "capped": "[it] y = Attention<softcap=2.0>(q, k, v)",
    "two": "[it] a = Attention(q, k, v) [other] y = Attention(a, k, v)",
    "without a name": "y = Attention(q, k, v)",
}
SHAPES = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)}


def model(body):
    heads = {name: ",".join(map(str, shape)) for name, shape in SHAPES.items()}
    inputs = [f"float[{shape}] {name}" for name, shape in heads.items()] + ["bool[3,5] mask"]
    text = f"attention ({', '.join(inputs)}) => (float[2,4,3,8] y) {{{body}}}"
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')


def run(program):
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    feed["mask"] = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], bool)
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: feed[each.name] for each in session.get_inputs()})[0]


@pytest.mark.parametrize("body", CALLS.values(), ids=CALLS)
def test_its_parts_compute_what_it_does_and_bear_its_name(body):
    program = model(body)
    result = InlineAttention()(program)
    assert result.modified
    onnx.checker.check_model(result.program, full_check=True)
    assert np.abs(run(result.program) - run(program)).max() < EXPORT
    nodes = result.program.graph.node
    assert "Attention" not in {node.op_type for node in nodes}
    owners = [node.name or node.output[0] for node in program.graph.node]
    assert list(dict.fromkeys(node.name.rpartition("/")[0] for node in nodes)) == owners
    assert len({node.name for node in nodes}) == len(nodes)


def test_all_else_stays_as_it_is():
    program = model("[first] a = Relu(q) [it] b = Attention(a, k, v) [last] y = Neg(b)")
    nodes = InlineAttention()(program).program.graph.node
    assert (nodes[0], nodes[-1]) == (program.graph.node[0], program.graph.node[-1])
    assert not InlineAttention()(model("[first] a = Relu(q) y = Neg(a)")).modified


def test_a_second_run_does_nothing():
    once = InlineAttention()(model(CALLS["plain"])).program
    again = InlineAttention()(once)
    assert not again.modified
    assert again.program == once
