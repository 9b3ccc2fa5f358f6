"""What is refused before a build: each rule is broken by a graph that the compiler refuses, and by no neighbour."""

import onnx
import pytest

import asapc.backends.tensorrt.builder as builder
from asapc.backends.tensorrt.builder import build_engine
from asapc.backends.tensorrt.preflight import RULES, UNKNOWN, preflight
from asapc.errors import BuildError
from asapc.types.artifacts import OnnxArtifact
from asapc.types.engine import EngineOptions
from asapc.types.graph import DynamicAxis

SORT = "sort (float[b,{length}] x) => (float[b,{length}] y) <int64[1] k={{{length}}}> {{[it] y, i = TopK(x, k)}}"
OPEN_SORT = """sort (float[b,n] x) => (float[b,n] y) <int64[1] one={1}, int64[1] two={2}>
    {s = Shape(x) k = Slice(s, one, two) [it] y, i = TopK(x, k)}"""
SCATTER = "scatter (float[b,8] x, int64[b,8] i) => (float[b,8] y) {{[it] y = ScatterElements<axis=1{more}>(x, i, x)}}"
SCATTER_ND = "scatter (float[b,8] x, int64[b,1] i) => (float[b,8] y) {{[it] y = ScatterND{more}(x, i, x)}}"
PRODUCT = "product ({kind}[b,8,8] x) => ({kind}[b,8,8] y) {{[it] y = MatMul(x, x)}}"
CAST = "cast (float[b,8] x) => (float[b,8] y) {{[it] c = Cast<to={number}>(x) y = Cast<to=1>(c)}}"
MASK = """mask (float[b,8] x) => (float[b,n] y) <int64[1] axis={0}>
    {s = ReduceSum<keepdims=0>(x, axis) m = Cast<to=9>(s) [it] y = Compress<axis=1>(x, m)}"""
INDICES = "indices (float[b,8] x) => (int64[2,n] y) {[it] y = NonZero(x)}"
WHERE = "where (float[b,8] x) => (float[b,8] y) <float zero={0}> {m = Greater(x, zero) [it] y = Where(m, x, zero)}"
DETERMINANT = "determinant (float[b,8,8] x) => (float[b] y) {[it] y = Det(x)}"
SUM = "sum (float[b,8,8] x) => (float[b] y) <int64[2] axes={1,2}> {[it] y = ReduceSum<keepdims=0>(x, axes)}"
OWN = "own (float[b,16] x) => (float[b,16] y) {[it] y = com.microsoft.FastGelu(x)}"
RELU = "own (float[b,16] x) => (float[b,16] y) {[it] y = Relu(x)}"
AXES = {"x": {0: DynamicAxis("batch", 1, 4), 1: DynamicAxis("seq", 2, 4000)}}
SHORT_AXES = {"x": {0: DynamicAxis("batch", 1, 4), 1: DynamicAxis("seq", 2, 3840)}}

# By rule: a graph that breaks it, one that does not, and what the message says.
PAIRS = {
    "a long sort": (SORT.format(length=3841), SORT.format(length=3840), "3841 elements"),
    "a scatter that adds": (SCATTER.format(more=', reduction="add"'), SCATTER.format(more=""), "reduction add"),
    "a scatter of rows": (SCATTER_ND.format(more='<reduction="add">'), SCATTER_ND.format(more=""), "reduction add"),
    "a product of integers": (PRODUCT.format(kind="int64"), PRODUCT.format(kind="float"), "matrices of int64"),
    "short integers": (CAST.format(number=5), CAST.format(number=6), "int16"),
    "unsigned integers": (CAST.format(number=13), CAST.format(number=7), "uint64"),
    "a boolean mask": (MASK, WHERE, "depends on the data"),
    "indices of what is not zero": (INDICES, WHERE, "depends on the data"),
    "an operator without a counterpart": (DETERMINANT, SUM, "no such operator"),
    "an operator of ONNX Runtime": (OWN, RELU, "com.microsoft"),
}


def written(text, folder) -> OnnxArtifact:
    imports = 'opset_import: ["": 18, "com.microsoft": 1]'
    onnx.save(onnx.parser.parse_model(f"<ir_version: 10, {imports}> {text}"), folder / "model.onnx")
    return OnnxArtifact(folder / "model.onnx", 18)


def build(artifact, axes=None):
    return build_engine(
        artifact, artifact.path.with_name("model.engine"), 4, axes, "tensorrt-rtx", EngineOptions(("SM89",))
    )


@pytest.fixture
def ahead_of_time(monkeypatch):
    """Build ahead of time, on machines with a GPU too."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(builder.torch.cuda, "is_available", lambda: False)


def assert_rule(breaks, keeps, phrase, monkeypatch, folder, axes=None, short_axes=None):
    """The preflight refuses the first graph, and so does the compiler, which builds the second."""
    assert build(written(keeps, folder), short_axes).targets == ("SM89",)
    artifact = written(breaks, folder)
    with pytest.raises(BuildError, match=phrase) as caught:
        build(artifact, axes)
    assert caught.value.node == "it"
    assert "(it)" in str(caught.value)
    assert caught.value.hint
    monkeypatch.setattr(builder, "preflight", lambda *arguments: None)
    with pytest.raises(BuildError):
        build(artifact, axes)


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_refused_is_what_the_compiler_refuses(name, ahead_of_time, monkeypatch, tmp_path):
    assert_rule(*PAIRS[name], monkeypatch, tmp_path)


def test_a_sort_of_open_length_is_refused_where_its_longest_is_too_long(ahead_of_time, monkeypatch, tmp_path):
    assert_rule(OPEN_SORT, OPEN_SORT, "4000 elements", monkeypatch, tmp_path, AXES, SHORT_AXES)


def test_operators_without_a_counterpart_are_those_that_the_parser_does_not_know():
    trt = pytest.importorskip("tensorrt_rtx")
    log = trt.Logger(trt.Logger.ERROR)
    maker = trt.Builder(log)
    parser = trt.OnnxParser(maker.create_network(0), log)
    assert [name for name in UNKNOWN if parser.supports_operator(name)] == []


def test_nodes_inside_others_are_looked_at(tmp_path):
    branch = "then () => (float[b,8,8] z) {[it] d = Det(x) z = Add(x, d)}"
    other = "other () => (float[b,8,8] z) {z = Identity(x)}"
    text = f"""outer (float[b,8,8] x, bool c) => (float[b,8,8] y)
        {{y = If (c) <then_branch = {branch}, else_branch = {other}>}}"""
    with pytest.raises(BuildError, match="Det") as caught:
        preflight("tensorrt_rtx", written(text, tmp_path).path, 4, {})
    assert caught.value.node == "it"


def test_functions_of_the_model_itself_are_no_foreign_operators(ahead_of_time, tmp_path):
    text = """<ir_version: 10, opset_import: ["": 18, "own": 1]>
        own (float[b,16] x) => (float[b,16] y) {y = own.Twice(x)}
        <domain: "own", opset_import: ["": 18]> Twice (x) => (y) {y = Add(x, x)}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert build(OnnxArtifact(tmp_path / "model.onnx", 18)).targets


def test_tensorrt_proper_is_held_to_what_nvidia_documents_of_it(tmp_path):
    preflight("tensorrt", written(INDICES, tmp_path).path, 4, {})
    with pytest.raises(BuildError, match="3841"):
        preflight("tensorrt", written(SORT.format(length=3841), tmp_path).path, 4, {})
    assert set(RULES["tensorrt"]) < set(RULES["tensorrt_rtx"])
