"""TensorRT engines, built ahead of time by NVIDIA's own compiler: no GPU is needed."""

import errno
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from helpers.slow import slow
from onnx import TensorProto, helper
from torch import nn

import asapc.backends.tensorrt.builder
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.tensorrt.builder import build_engine, try_engine
from asapc.backends.tensorrt.compiler import combine
from asapc.capturing.export import export
from asapc.errors import BuildError, DependencyError
from asapc.ops.features import pairs_of
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.types.artifacts import OnnxArtifact
from asapc.types.choices import SlicedDualParams
from asapc.types.engine import EngineOptions, Place
from asapc.types.graph import CapturedGraph, DynamicAxis
from asapc.types.samples import Samples

HEADS, SIZE, TOKENS = 2, 4, 12
ONE = EngineOptions(architectures=("SM89",))  # to build for all takes six times as long


class OfPoints(nn.Module):
    """An operator as attention: of queries, keys and values, and of a mask where it takes one."""

    def __init__(self, operator: nn.Module, masked: bool = False, plan: bool = False) -> None:
        super().__init__()
        self.operator, self.masked, self.plan = operator, masked, plan

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if self.operator.lowering == "fused":
            live = (values[..., :1].transpose(-1, -2) <= 1).to(queries.dtype) if self.masked else None
            return self.operator.from_points(queries, queries, keys, values, live)
        scores = queries @ keys.transpose(-1, -2)
        if self.masked:  # made of the values, so that it differs by sample
            scores = scores.masked_fill(values[..., :1].transpose(-1, -2) > 1, -torch.inf)
        return self.operator(scores, queries, keys, None if self.plan else values)


@pytest.fixture
def ahead_of_time(monkeypatch):
    """Build ahead of time, on machines with a GPU too."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def sliced_dual(
    slices: int, masked: bool = False, last: str = "rows", pieces: int = 0, paired: bool = False, fused: bool = False
) -> nn.Module:
    features = slices + SIZE + 1 + 2 * pieces + 2 * paired * pairs_of(SIZE).shape[-1]
    operator = SlicedDual(
        SlicedDualParams(
            query_basis=torch.randn(HEADS, SIZE, SIZE),
            key_basis=torch.randn(HEADS, SIZE, SIZE),
            slices=slices,
            knots=torch.linspace(-1, 1, pieces).expand(HEADS, 2, -1) if pieces else torch.zeros(HEADS, 0, 0),
            weights=(0.1 * torch.randn(HEADS, features), 0.1 * torch.randn(HEADS, features + 1)),
            paired=paired,
        ),
        last,
        masked,
        lowering="fused" if fused else "materialised",
    )
    return OfPoints(operator, masked)


class Projected(nn.Module):
    """A scaling loop between projections, as models have it: what NVIDIA's compiler fuses, or tries to."""

    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.operator, self.qkv, self.out = operator, nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(queries + keys + values).chunk(3, dim=-1)
        scores = k @ q.transpose(-1, -2) if self.operator.turned else q @ k.transpose(-1, -2)
        return self.out(self.operator.oriented(scores, q, k, v))


OPERATORS = {
    "sliced dual": lambda: sliced_dual(0),
    "sliced dual with slices": lambda: sliced_dual(3),
    "sliced dual with hinges": lambda: sliced_dual(0, pieces=3),
    "sliced dual with pairs": lambda: sliced_dual(0, paired=True),
    "masked sliced dual": lambda: sliced_dual(0, masked=True, paired=True),
    "sliced dual that ends on columns": lambda: sliced_dual(0, last="columns"),
    "projected Sinkhorn": lambda: Projected(Sinkhorn(7)),
    "projected Sinkhorn, turned": lambda: Projected(Sinkhorn(8)),
    "projected Sinkhorn, wide": lambda: Projected(Sinkhorn(7, wide=True)),
    "projected softmax": lambda: Projected(Sinkhorn(1)),
    "fused sliced dual": lambda: sliced_dual(0, paired=True, fused=True),
    "fused sliced dual with slices": lambda: sliced_dual(3, fused=True),
    "fused Sinkhorn": lambda: OfPoints(Sinkhorn(4, lowering="fused")),
    "masked fused sliced dual": lambda: sliced_dual(0, masked=True, paired=True, fused=True),
    "masked fused Sinkhorn": lambda: OfPoints(Sinkhorn(4, lowering="fused"), masked=True),
    "fused softmax": lambda: OfPoints(Sinkhorn(1, lowering="fused")),
    "Sinkhorn": lambda: OfPoints(Sinkhorn(6)),
    "Sinkhorn that ends on columns": lambda: OfPoints(Sinkhorn(5, "columns")),
    "masked Sinkhorn": lambda: OfPoints(Sinkhorn(6, masked=True), masked=True),
    "Sinkhorn with masses": lambda: OfPoints(Sinkhorn(6, "rows", torch.rand(TOKENS) + 0.5, torch.rand(TOKENS) + 0.5)),
}


def exported(module: nn.Module, path, axes=None, precision=None) -> OnnxArtifact:
    inputs = {name: torch.randn(2, HEADS, TOKENS, SIZE) for name in ("queries", "keys", "values")}
    if precision is not None:
        module = InPrecision(module, precision)
    graph = CapturedGraph(export(module, inputs, axes), Samples(inputs), axes=axes)
    return export_onnx(graph, path, {}, standard=precision is not None)


class InPrecision(nn.Module):
    """An operator on queries, keys and values in half precision, as `InLayout` calls it."""

    def __init__(self, attention: OfPoints, precision: torch.dtype) -> None:
        super().__init__()
        self.operator, self.precision = attention.operator, precision

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = (points.to(self.precision) for points in (queries, keys, values))
        if self.operator.lowering == "fused":
            return self.operator.from_points(q, q, k, v).float()
        return self.operator((q @ k.transpose(-1, -2)).float(), q, k, v).float()


# Of operators that differ in one respect only, the one with more of it; a compiler takes seconds for each.
DYNAMIC = (
    "sliced dual with slices",
    slow("masked sliced dual"),
    "projected Sinkhorn, wide",
    "masked fused sliced dual",
    slow("masked Sinkhorn"),
    "Sinkhorn with masses",
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_an_engine_is_built_for_every_operator_with_a_dynamic_batch(name, ahead_of_time, tmp_path):
    artifact = exported(OPERATORS[name](), tmp_path / "model.onnx")
    # A profile from 1 to 5 builds only if the batch is dynamic.
    engine = build_engine(artifact, tmp_path / "model.engine", 5, options=ONE)
    assert engine.path == tmp_path / "model.engine"
    assert engine.path.stat().st_size > 1000
    assert engine.builder.startswith("tensorrt-rtx ")
    assert engine.targets
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.engine", "model.onnx"]


HALVES = [("float16", "fused sliced dual"), ("bfloat16", "sliced dual with slices")]


@pytest.mark.parametrize(("precision", "name"), HALVES)
def test_an_engine_is_built_in_half_precision(name, precision, ahead_of_time, tmp_path):
    artifact = exported(OPERATORS[name](), tmp_path / "model.onnx", precision=getattr(torch, precision))
    engine = build_engine(artifact, tmp_path / "model.engine", 5, options=ONE)
    assert engine.targets == ONE.architectures


@pytest.mark.parametrize("name", ["masked Sinkhorn", slow("fused sliced dual")])
def test_an_engine_is_built_for_a_range_of_lengths(name, ahead_of_time, tmp_path):
    open_axes = {0: DynamicAxis("batch", 1, 4), 2: DynamicAxis("seq", 2, 6000)}  # more than TensorRT sorts
    axes = dict.fromkeys(("queries", "keys", "values"), open_axes)
    artifact = exported(OPERATORS[name](), tmp_path / "model.onnx", axes)
    assert build_engine(artifact, tmp_path / "model.engine", 4, axes, options=ONE).targets


def test_every_target_is_built_for_or_refused_with_a_reason(ahead_of_time, tmp_path):
    import tensorrt_rtx

    capabilities = {name for name in tensorrt_rtx.ComputeCapability.__members__ if name.startswith("SM")}
    artifact = exported(OPERATORS["sliced dual"](), tmp_path / "model.onnx")
    engine = build_engine(artifact, tmp_path / "model.engine", largest_batch=2)
    assert {*engine.targets, *engine.refused} == capabilities
    assert not set(engine.targets) & engine.refused.keys()
    assert all(reason.strip() for reason in engine.refused.values())
    assert list(engine.targets) == sorted(engine.targets, key=lambda name: int(name[2:]))


def assert_refused(artifact: OnnxArtifact) -> str:
    """The builder refuses the model with a hint and leaves no file; returns the message."""
    folder = artifact.path.parent
    with pytest.raises(BuildError) as caught:
        build_engine(artifact, folder / "model.engine", largest_batch=2)
    assert caught.value.hint
    assert [path.name for path in folder.iterdir()] == [artifact.path.name]
    return str(caught.value)


def test_a_model_that_no_target_can_serve_is_refused_with_the_compilers_reason(ahead_of_time, tmp_path):
    length = 4000  # TensorRT's TopK takes 3840
    sort = helper.make_node("TopK", ["x", "k"], ["y", "order"], axis=1, largest=1, sorted=1)
    model = helper.make_model(
        helper.make_graph(
            [sort],
            "sort",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", length])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", length])],
            [helper.make_tensor("k", TensorProto.INT64, [1], [length])],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(model, tmp_path / "model.onnx")
    message = assert_refused(OnnxArtifact(tmp_path / "model.onnx", 18))
    assert "3840" in message
    assert "\n" not in message


def test_a_fixed_batch_is_refused_where_a_dynamic_one_is_asked_for(ahead_of_time, tmp_path):
    model = onnx.load(exported(OPERATORS["sliced dual"](), tmp_path / "model.onnx").path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "model.onnx")
    assert_refused(OnnxArtifact(tmp_path / "model.onnx", 18))


@pytest.mark.parametrize("content", [b"", b"not an ONNX file"])
def test_a_file_that_cannot_be_parsed_is_refused(content, ahead_of_time, tmp_path):
    (tmp_path / "model.onnx").write_bytes(content)
    assert_refused(OnnxArtifact(tmp_path / "model.onnx", 18))


def test_a_compiler_that_crashes_is_an_error_of_one_line(ahead_of_time, monkeypatch, tmp_path):
    artifact = exported(OPERATORS["Sinkhorn"](), tmp_path / "model.onnx")
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", crash)
    assert "SIGSEGV" in assert_refused(artifact)
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", "raise RuntimeError('no licence')")
    message = assert_refused(artifact)
    assert "no licence" in message
    assert "\n" not in message


def test_an_error_says_where_the_node_comes_from(ahead_of_time, monkeypatch, tmp_path):
    (tmp_path / "model.onnx").touch()
    places = {"node_7": Place("blocks.0", "model.py:12")}
    artifact = OnnxArtifact(tmp_path / "model.onnx", 18, places)
    ends = {
        "node_7": " (module blocks.0, model.py:12)",
        "node_7/scores": " (at node node_7/scores, module blocks.0, model.py:12)",
        "x": " (at node x)",
    }
    for node, end in ends.items():
        answer = json.dumps({"error": "Error Code 4 at node_7", "hint": "report it", "node": node})
        monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", f"print({answer!r})")
        assert assert_refused(artifact).endswith(end)


def test_a_crash_names_the_node_of_the_logs_last_lines_and_keeps_them(ahead_of_time, monkeypatch, tmp_path):
    artifact = exported(OPERATORS["Sinkhorn"](), tmp_path / "model.onnx")
    node = onnx.load(artifact.path).graph.node[3].name
    crash = (
        "import json, os, signal, sys; request = json.loads(sys.argv[-1]); "
        f"open(request['log'], 'w').write('Found {node} to be part of self-attention pattern.\\nGraph ready\\n'); "
        "os.kill(os.getpid(), signal.SIGSEGV)"
    )
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", crash)
    with pytest.raises(BuildError, match=f"SIGSEGV.*{node}") as caught:
        build_engine(artifact, tmp_path / "model.engine", 2, options=ONE)
    assert caught.value.node == node
    log = Path(caught.value.hint.rsplit(", ")[-1])
    assert "Graph ready" in log.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_the_engines_layers_name_the_nodes_that_they_compute(ahead_of_time, tmp_path):
    artifact = exported(OPERATORS["fused softmax"](), tmp_path / "model.onnx", precision=torch.float16)
    engine = build_engine(artifact, tmp_path / "model.engine", 2, options=ONE)
    nodes = {node.name for node in onnx.load(artifact.path).graph.node}
    assert nodes & {name for layer in engine.layers for name in layer.nodes}
    assert any("Half" in layer.precision for layer in engine.layers)


def test_too_small_a_workspace_is_refused_with_what_to_change(ahead_of_time, tmp_path):
    artifact = exported(OPERATORS["Sinkhorn"](), tmp_path / "model.onnx")
    with pytest.raises(BuildError, match="workspace limit") as caught:
        build_engine(artifact, tmp_path / "model.engine", 2, options=replace(ONE, workspace=2**20))
    assert "--workspace" in caught.value.hint


def test_what_most_architectures_say_comes_first():
    small = BuildError("no tactic within workspace limit", "give a larger one", "node_2")
    error = combine({"SM75": BuildError("no such product", "give another", "node_1"), "SM80": small, "SM86": small})
    assert str(error) == "SM80, SM86: no tactic within workspace limit; SM75: no such product"
    assert (error.hint, error.node) == ("give a larger one", "node_2")
    assert str(combine({"SM80": small, "SM86": small})) == str(small)


def test_an_engine_that_fails_is_a_result_unless_it_was_asked_for_by_name(ahead_of_time, monkeypatch, tmp_path):
    (tmp_path / "model.onnx").touch()
    artifact, path = OnnxArtifact(tmp_path / "model.onnx", 18), tmp_path / "model.engine"
    answer = '{"error": "Error Code 4 at node_7", "hint": "report it", "node": "node_7"}'
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", f"print('{answer}')")
    result = try_engine("auto", artifact, path, 2)
    assert (result.status, result.reason, result.node) == ("failed", "Error Code 4 at node_7", "node_7")
    with pytest.raises(BuildError, match="Error Code 4"):
        try_engine("tensorrt-rtx", artifact, path, 2)
    with pytest.raises(DependencyError, match="needs an NVIDIA GPU"):
        try_engine("tensorrt", artifact, path, 2)
    for target in ("onnx", "cuda"):
        assert try_engine(target, artifact, path, 2).status == "omitted"


def test_a_full_disk_is_no_crash_of_the_compiler(ahead_of_time, monkeypatch, tmp_path):
    (tmp_path / "model.onnx").touch()
    answer = f'{{"errno": {errno.ENOSPC}, "file": "engine"}}'
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", f"print('{answer}')")
    with pytest.raises(OSError, match="No space left") as caught:
        try_engine("auto", OnnxArtifact(tmp_path / "model.onnx", 18), tmp_path / "model.engine", 2)
    assert caught.value.errno == errno.ENOSPC


def test_a_compiler_that_hangs_is_stopped(ahead_of_time, monkeypatch, tmp_path):
    (tmp_path / "model.onnx").touch()
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", "import time; time.sleep(1000)")
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "MAX_SECONDS", 1)
    assert "more than 1 s" in assert_refused(OnnxArtifact(tmp_path / "model.onnx", 18))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel kills it on Linux alone")
def test_the_compilers_process_dies_with_its_parent():
    child = (
        "import os, sys, time; from asapc.backends.tensorrt.compiler import limit_process; "
        "limit_process(int(sys.argv[1]), 900); print(os.getpid(), flush=True); time.sleep(900)"
    )
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    number = process.stdout.readline()
    assert int(number)
    process.kill()
    # The pipe ends when the last process that could write to it has ended.
    assert process.stdout.read() == ""


def test_the_compilers_process_imports_no_torch():
    code = "import sys, asapc.backends.tensorrt.compiler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_a_builder_the_missing_package_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    absent = ("tensorrt", "tensorrt_rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(DependencyError) as caught:
        build_engine(OnnxArtifact(tmp_path / "model.onnx", 18), tmp_path / "model.engine", largest_batch=2)
    assert caught.value.exit_code == 1
    assert "pip install tensorrt-rtx-cu12" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
