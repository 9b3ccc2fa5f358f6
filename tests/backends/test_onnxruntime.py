"""ONNX files: exported whole or not at all, and run with the answers that PyTorch gives."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.paths import ROOT
from helpers.tolerances import EXPORT, difference
from torch import nn
from torch.onnx._internal.fx.passes import type_promotion

from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime import builder
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.cuda import CudaRunner
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.capture import capture_code
from asapc.capturing.export import export
from asapc.errors import BuildError
from asapc.ops.sinkhorn import Sinkhorn
from asapc.types.graph import CapturedGraph, DynamicAxis
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples


class TwoInputs(nn.Module):
    """Returns two outputs of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(left) + right, right.exp()


@dataclass
class Result:
    """What a forward may return."""

    logits: torch.Tensor
    rest: dict[str, torch.Tensor]


class Structured(nn.Module):
    """Returns names of which each is also that of an operation within, or of an input."""

    def forward(self, x):
        y = x.exp().tanh()
        return Result(y.mean(1), {"exp": y, "tanh": x.exp(), "twice": y, "given": x})


class Named(NamedTuple):
    """What a forward may return."""

    x: torch.Tensor
    plan: torch.Tensor | None


class NamedAsInput(nn.Module):
    def forward(self, x):
        return Named(x.exp(), x.tanh())


class MixedNorms(nn.Module):
    """Norms whose weights are wider than what they normalise, as automatic casts leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group = nn.LayerNorm(4), nn.GroupNorm(2, 6)

    def forward(self, x):
        half = x.half()
        return self.layer(half).float() + self.group(half).float()


def graph(module: nn.Module, **inputs: torch.Tensor) -> CapturedGraph:
    return CapturedGraph(export(module.eval(), inputs), Samples(inputs))


def exported(module: nn.Module, path: Path) -> tuple[CapturedGraph, OnnxRuntimeRunner]:
    """A model captured as in a compilation, and its ONNX file."""
    loaded = LoadedModel(module.eval(), path, "", 0, None, None)
    captured = capture_code(loaded, Samples({"x": torch.rand(2, 6, 4)}))
    return captured, OnnxRuntimeRunner(export_onnx(captured, path / "model.onnx", {}).path, threads=1)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Structured, ["logits", "rest.exp", "rest.tanh", "rest.twice", "rest.given"]),
        (NamedAsInput, ["exp", "plan"]),
    ],
)
def test_outputs_have_the_names_that_the_forward_gives_them(kind, names, tmp_path):
    module = kind()
    _, runner = exported(module, tmp_path)
    assert runner.outputs == names
    samples = Samples({"x": torch.rand(3, 6, 4)})
    for actual, expected in zip(runner(samples), EagerRunner(module)(samples), strict=True):
        assert difference(actual, expected) < EXPORT


def test_outputs_of_the_name_of_an_operation_within_are_no_second_of_it(tmp_path):
    class Swapped(nn.Module):
        def forward(self, x):
            return {"tanh": x.exp(), "exp": x.exp().tanh().sum(1)}

    _, runner = exported(Swapped(), tmp_path)
    samples = Samples({"x": torch.rand(3, 6, 4)})
    assert runner.outputs == ["tanh", "exp"]
    for actual, expected in zip(runner(samples), EagerRunner(Swapped())(samples), strict=True):
        assert difference(actual, expected) < EXPORT


def test_norms_of_mixed_types_are_written_as_torch_computes_them(tmp_path):
    captured, runner = exported(MixedNorms(), tmp_path)
    samples = Samples({"x": torch.rand(3, 6, 4)})
    (expected,) = EagerRunner(MixedNorms().eval())(samples)
    for actual in (runner(samples)[0], EagerRunner(captured.program.module())(samples)[0]):
        assert actual.dtype == expected.dtype
        assert difference(actual, expected) < 2e-3  # float16


@pytest.fixture
def pair(tmp_path):
    """The same model in PyTorch and in ONNX Runtime."""
    module = TwoInputs()
    captured = graph(module, left=torch.rand(2, 3), right=torch.rand(2, 2))
    artifact = export_onnx(captured, tmp_path / "model.onnx", {"asapc.version": "1.2.3"})
    return EagerRunner(module), OnnxRuntimeRunner(artifact.path, threads=1)


def test_runners_say_what_they_run_in(pair):
    assert [runner.runtime for runner in pair] == ["torch", "onnxruntime"]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_both_runners_give_the_same_outputs_in_the_same_order_for_every_batch(pair, batch):
    samples = Samples({"left": torch.rand(batch, 3), "right": torch.rand(batch, 2)})
    expected, actual = (runner(samples) for runner in pair)
    assert len(expected) == len(actual) == 2
    for reference, candidate in zip(expected, actual, strict=True):
        assert candidate.shape == reference.shape
        assert torch.linalg.vector_norm(candidate - reference) <= EXPORT * torch.linalg.vector_norm(reference)


def test_a_runner_runs_on_the_cpu_provider_alone(pair):
    assert pair[1].session.get_providers() == ["CPUExecutionProvider"]


def test_an_input_that_the_graph_does_not_read_is_no_obstacle(tmp_path):
    class Ignores(nn.Module):
        def forward(self, used: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return 2 * used

    inputs = {"used": torch.rand(2, 3), "unused": torch.rand(2, 3)}
    artifact = export_onnx(graph(Ignores(), **inputs), tmp_path / "model.onnx", {})
    (output,) = OnnxRuntimeRunner(artifact.path)(Samples(inputs))
    assert torch.equal(output, 2 * inputs["used"])


@pytest.mark.parametrize(("approximate", "fused"), [("none", True), ("tanh", False)])
def test_a_layer_with_a_gelu_gives_the_same_and_the_erf_form_is_one_kernel(tmp_path, approximate, fused):
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(approximate))
    samples = Samples({"input": 4 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))})
    artifact = export_onnx(graph(module, **samples.inputs), tmp_path / "model.onnx", {})
    onnx.checker.check_model(onnx.load(artifact.path), full_check=True)
    (expected,), (actual,) = EagerRunner(module)(samples), OnnxRuntimeRunner(artifact.path, threads=1)(samples)
    assert torch.linalg.vector_norm(actual - expected) <= EXPORT * torch.linalg.vector_norm(expected)

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    kernels = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert bool(kernels & {"Gelu", "BiasGelu"}) == fused


def test_the_file_has_the_names_the_metadata_and_a_dynamic_batch(pair, tmp_path):
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["left", "right"]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("asapc.version", "1.2.3")]
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


def test_two_exports_of_one_graph_are_equal_byte_for_byte(tmp_path):
    captured = graph(TwoInputs(), left=torch.rand(2, 3), right=torch.rand(2, 2))
    first, second = (export_onnx(captured, tmp_path / name, {}).path.read_bytes() for name in ("a.onnx", "b.onnx"))
    assert first == second


class Mixed(nn.Module):
    """Computes with types that have to be promoted, and with slices, of which an optimizer looks for pairs."""

    def forward(self, x, counts):
        shares = (counts / counts.sum(1, keepdim=True)).where(counts > 1, 2) ** 2
        return x[:, :2] * x[:, 2:] * counts + shares, (x > 0).sum(1), torch.where(x > 0, counts[:, :1], x)


def test_what_is_left_out_of_an_export_changes_nothing(tmp_path, monkeypatch):
    inputs = {"x": torch.randn(3, 4), "counts": torch.randint(1, 9, (3, 2))}
    mixed = graph(Mixed(), **inputs)
    quick = export_onnx(mixed, tmp_path / "quick.onnx", {}).path
    monkeypatch.setattr(builder, "quick_matching", nullcontext)
    monkeypatch.setattr(builder, "run_promoted", type_promotion._TypePromotionInterpreter.run_node)
    assert export_onnx(mixed, tmp_path / "whole.onnx", {}).path.read_bytes() == quick.read_bytes()
    torch.testing.assert_close(tuple(OnnxRuntimeRunner(quick)(Samples(inputs))), Mixed()(**inputs))


def test_an_operation_without_an_onnx_form_is_named_and_nothing_is_written(tmp_path):
    class Eigen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x @ x.transpose(-1, -2))

    captured = graph(Eigen(), x=torch.rand(2, 3, 3))
    with pytest.raises(BuildError) as caught:
        export_onnx(captured, tmp_path / "model.onnx", {})
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert "eigh" in str(caught.value)  # what the user has to look for
    assert list(tmp_path.iterdir()) == []


def test_an_export_says_nothing_on_the_terminal(tmp_path, capfd):
    export_onnx(graph(nn.Linear(3, 2), input=torch.rand(2, 3)), tmp_path / "model.onnx", {})
    assert capfd.readouterr() == ("", "")


def fixed_reshape(path):
    """A file that runs for a batch of two alone, whatever its input says."""
    shape = onnx.numpy_helper.from_array(np.array([2, 3]), "shape")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Reshape", ["x", "shape"], ["y"], "turn")],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 3])],
        [value("y", onnx.TensorProto.FLOAT, [None, 3])],
        [shape],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_an_error_in_onnx_runtime_is_one_line_that_names_variant_and_batch(tmp_path, capfd):
    runner = OnnxRuntimeRunner(fixed_reshape(tmp_path / "m.onnx"), 1, "truncated")
    (output,) = runner(Samples({"x": torch.rand(2, 3)}))
    assert output.shape == (2, 3)
    with pytest.raises(BuildError, match="truncated at batch 5") as caught:
        runner(Samples({"x": torch.rand(5, 3)}))
    assert "\n" not in str(caught.value)
    assert "Reshape" in str(caught.value)
    assert caught.value.hint
    with pytest.raises(BuildError, match="truncated at batch 2"):
        runner(Samples({"x": torch.rand(2, 3).double()}))
    assert capfd.readouterr() == ("", "")


def test_a_file_that_onnx_runtime_refuses_is_named(tmp_path, capfd):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(BuildError, match=r"refuses m\.onnx"):
        OnnxRuntimeRunner(tmp_path / "m.onnx")
    model = onnx.load(fixed_reshape(tmp_path / "m.onnx"))
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BuildError, match="refuses exact"):
        OnnxRuntimeRunner(tmp_path / "m.onnx", 1, "exact")
    assert capfd.readouterr() == ("", "")


def test_the_batch_is_called_batch(tmp_path):
    class Reshapes(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.flatten(0, 1), x.exp()

    path = export_onnx(graph(Reshapes(), x=torch.rand(2, 3, 4)), tmp_path / "model.onnx", {}).path
    result = onnx.load(path).graph
    dims = [value.type.tensor_type.shape.dim[0].dim_param for value in (*result.input, *result.output)]
    assert dims == ["batch", "3*batch", "batch"]


class Fused(nn.Module):
    """An operator in fused passes."""

    def __init__(self) -> None:
        super().__init__()
        self.operator = Sinkhorn(5, lowering="fused")

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self.operator.from_points(queries, queries, keys, values)


@pytest.fixture
def fused():
    inputs = {"queries": torch.randn(2, 3, 17, 4), "keys": torch.randn(2, 3, 19, 4), "values": torch.randn(2, 3, 19, 5)}
    return graph(Fused(), **inputs)


@pytest.mark.filterwarnings("error::FutureWarning")  # of torch itself, which is nothing to a user
def test_fused_attention_is_onnx_runtimes_own_and_never_holds_the_scores(fused, tmp_path):
    artifact = export_onnx(fused, tmp_path / "model.onnx", {})
    model = onnx.load(artifact.path)
    assert [node.op_type for node in model.graph.node].count("MultiHeadAttention") == 5
    assert "Softmax" not in {node.op_type for node in model.graph.node}
    for batch in (1, 2, 4):
        samples = fused.example[[i % 2 for i in range(batch)]]
        expected, actual = EagerRunner(Fused())(samples)[0], OnnxRuntimeRunner(artifact.path)(samples)[0]
        assert torch.linalg.vector_norm(actual - expected) <= EXPORT * torch.linalg.vector_norm(expected)


def test_fused_attention_has_a_standard_form_that_gives_the_same(fused, tmp_path):
    paths = [tmp_path / "own.onnx", tmp_path / "standard.onnx"]
    own, standard = (export_onnx(fused, path, {}, standard=path.stem == "standard") for path in paths)
    assert {node.domain for node in onnx.load(standard.path).graph.node} == {""}
    expected, actual = (OnnxRuntimeRunner(artifact.path)(fused.example)[0] for artifact in (own, standard))
    assert torch.linalg.vector_norm(actual - expected) <= EXPORT * torch.linalg.vector_norm(expected)


def test_open_axes_are_named_in_the_file(tmp_path):
    axes = {
        name: {0: DynamicAxis("batch", 1, None), 2: DynamicAxis(axis, 2, 64)}
        for name, axis in (("queries", "n"), ("keys", "m"), ("values", "m"))
    }
    inputs = {"queries": torch.randn(2, 3, 17, 4), "keys": torch.randn(2, 3, 19, 4), "values": torch.randn(2, 3, 19, 5)}
    captured = CapturedGraph(export(Fused(), inputs, axes), Samples(inputs), axes=axes)
    artifact = export_onnx(captured, tmp_path / "model.onnx", {})
    names = [[d.dim_param for d in v.type.tensor_type.shape.dim][:3] for v in onnx.load(artifact.path).graph.input]
    assert names == [["batch", "", "n"], ["batch", "", "m"], ["batch", "", "m"]]
    shapes = {"queries": (3, 3, 5, 4), "keys": (3, 3, 30, 4), "values": (3, 3, 30, 5)}
    other = Samples({name: torch.randn(shape) for name, shape in shapes.items()})
    expected, actual = EagerRunner(Fused())(other)[0], OnnxRuntimeRunner(artifact.path)(other)[0]
    assert torch.linalg.vector_norm(actual - expected) <= EXPORT * torch.linalg.vector_norm(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_cuda_runner_says_so(tmp_path):
    captured = graph(TwoInputs(), left=torch.rand(2, 3), right=torch.rand(2, 2))
    path = export_onnx(captured, tmp_path / "model.onnx", {}).path
    with pytest.raises(BuildError, match=r"cannot run model.onnx on a GPU: it finds no CUDA"):
        CudaRunner(path, captured.example)


def test_onnx_runtime_starts_without_telemetry(pair, tmp_path):
    """No device id under the user's cache, no session file in the temporary folder."""
    code = "import sys, pathlib; from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner as Runner\n"
    code += "import asapc; Runner(pathlib.Path(sys.argv[1]))"
    folders = {name: tmp_path / name for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    for folder in folders.values():
        folder.mkdir()
    # ONNX Runtime tells the machines of CI by these variables, and is silent there of itself.
    plain = {name: value for name, value in os.environ.items() if "CI" not in name and name != "ORT_DISABLE_TELEMETRY"}
    environment = plain | {name: str(folder) for name, folder in folders.items()}
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.onnx"], env=environment, cwd=ROOT, check=True)
    assert [path for folder in folders.values() for path in folder.rglob("*") if "matplotlib" not in str(path)] == []
