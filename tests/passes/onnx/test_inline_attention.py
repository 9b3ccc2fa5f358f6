import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.tolerances import EXPORT

from asapc.passes.onnx.inline_attention import InlineAttention

SHAPES = {
    "q": (2, 2, 3, 8),
    "k": (2, 2, 5, 8),
    "v": (2, 2, 5, 8),
    "many": (2, 4, 3, 8),
    "flat": (2, 3, 16),
    "past_k": (2, 2, 4, 8),
    "past_v": (2, 2, 4, 8),
    "bias": (3, 5),
    "mask": (3, 5),
}
FLAT = "q_num_heads=2, kv_num_heads=2"
# The shape of what is computed, and how; the first are plain.
PLAIN = {
    "as it comes": ("2,2,3,8", "[it] y = Attention(q, k, v)"),
    "scaled": ("2,2,3,8", "[it] y = Attention<scale=0.5, is_causal=0>(q, k, v)"),
    "joined heads": ("2,3,16", f"[it] y = Attention<{FLAT}>(flat, flat, flat)"),
    "two": ("2,2,3,8", "[it] a = Attention(q, k, v) [other] y = Attention(a, k, v)"),
    "without a name": ("2,2,3,8", "y = Attention(q, k, v)"),
}
OTHERS = {
    "causal": ("2,2,3,8", "[it] y = Attention<is_causal=1>(q, k, v)"),
    "masked": ("2,2,3,8", "[it] y = Attention(q, k, v, mask)"),
    "biased": ("2,2,3,8", "[it] y = Attention(q, k, v, bias)"),
    "capped": ("2,2,3,8", "[it] y = Attention<softcap=2.0>(q, k, v)"),
    "grouped heads": ("2,4,3,8", "[it] y = Attention(many, k, v)"),
    "causal, joined heads": ("2,3,16", f"[it] y = Attention<{FLAT}, is_causal=1>(flat, flat, flat)"),
    "with a cache": ("2,2,3,8", "[it] y, more_k, more_v = Attention(q, k, v, , past_k, past_v)"),
}


def model(shape, body):
    kinds = {"mask": "bool"}
    inputs = [f"{kinds.get(name, 'float')}[{','.join(map(str, sizes))}] {name}" for name, sizes in SHAPES.items()]
    text = f"attention ({', '.join(inputs)}) => (float[{shape}] y) {{{body}}}"
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')


def run(program):
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(sizes).astype(np.float32) for name, sizes in SHAPES.items()}
    feed["mask"] = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], bool)
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: feed[each.name] for each in session.get_inputs()})[0]


def copy(program):
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(program)
    return rewritten


@pytest.mark.parametrize("case", [*PLAIN.values(), *OTHERS.values()], ids=[*PLAIN, *OTHERS])
def test_its_parts_compute_what_it_does_and_bear_its_name(case):
    program = model(*case)
    result = InlineAttention()(copy(program))
    assert result.modified
    onnx.checker.check_model(result.program, full_check=True)
    np.testing.assert_allclose(run(result.program), run(program), rtol=0, atol=EXPORT)
    nodes = result.program.graph.node
    owners = [node.name or node.output[0] for node in program.graph.node]
    assert list(dict.fromkeys(node.name.rpartition("/")[0] for node in nodes)) == owners
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_plain_attention_is_what_compilers_fuse(case):
    nodes = InlineAttention()(model(*case)).program.graph.node
    kinds = [node.op_type for node in nodes if node.op_type in ("Mul", "MatMul", "Add", "Softmax", "Where")]
    assert kinds == ["Mul", "MatMul", "Softmax", "MatMul"] * (len(kinds) // 4)


def test_all_else_stays_as_it_is():
    program = model("2,2,3,8", "[first] a = Relu(q) [it] b = Attention(a, k, v) [last] y = Neg(b)")
    nodes = InlineAttention()(copy(program)).program.graph.node
    assert (nodes[0], nodes[-1]) == (program.graph.node[0], program.graph.node[-1])
    plain = model("2,2,3,8", "[first] a = Relu(q) y = Neg(a)")
    result = InlineAttention()(copy(plain))
    assert (result.modified, result.program) == (False, plain)


def test_a_second_run_does_nothing():
    once = InlineAttention()(model(*PLAIN["as it comes"])).program
    again = InlineAttention()(copy(once))
    assert not again.modified
    assert again.program == once
