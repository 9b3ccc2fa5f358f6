"""What `compile` does with a GPU, by a fake one: the engine is run, compared and timed, or it is said why not."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from helpers import fake_gpu
from helpers.command import write_checkpoint
from helpers.fake_gpu import FakeCuda, FakeTensorRT, engine_bytes
from helpers.paths import ROOT

from asapc import showing
from asapc.backends.onnxruntime.library import library
from asapc.backends.tensorrt.cuda import Cuda
from asapc.backends.tensorrt.loader import open_engine
from asapc.backends.tensorrt.runner import EngineRunner
from asapc.commands import compile as module
from asapc.commands.compile import compile_model
from asapc.commands.gpu import measure_gpu, open_built
from asapc.config import CompileConfig
from asapc.errors import FidelityError
from asapc.types.artifacts import EngineArtifact, EngineResult, OnnxArtifact
from asapc.types.samples import Samples
from asapc.writing.report import engine_note

SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())
OPTIONS = {"level": 1, "fidelity": ("output-error<=0.01",), "batches": (1, 4), "seconds": 0.05}


@pytest.fixture
def trt(monkeypatch) -> FakeTensorRT:
    """A GPU, and a builder whose engines compute what the ONNX file beside them does."""
    gpu = FakeCuda()
    fake = FakeTensorRT(gpu)
    fake_gpu.install(monkeypatch, gpu, fake)

    def build(target, onnx, path: Path, largest_batch: int, axes=None, options=None) -> EngineResult:
        session = library().InferenceSession(str(onnx.path), providers=["CPUExecutionProvider"])
        (given,), (result,) = session.get_inputs(), session.get_outputs()
        sizes = given.shape[1:]
        inputs = {given.name: {"dtype": "FLOAT", "low": [1, *sizes], "high": [largest_batch, *sizes]}}
        path.write_bytes(engine_bytes(inputs, {result.name: {"dtype": "FLOAT", "shape": ["batch", *result.shape[1:]]}}))
        if fake.function is None:
            fake.function = lambda arrays: session.run(None, arrays)[0]
        return EngineResult("built", EngineArtifact(path, "tensorrt 10.13.3.9", ("SM89",), {}))

    monkeypatch.setattr(module, "try_engine", build)
    return fake


def compiled(folder: Path, **options):
    path = write_checkpoint(folder / "model.pt", iterations=2)
    return compile_model(path, CompileConfig(out=folder / "out", **{**OPTIONS, **options}))


def lines(report) -> str:
    return "\n".join(str(part) for part in showing.compilation(report.folder, dict(report.data)))


def test_an_engine_is_compared_as_a_hop_and_timed_on_its_gpu(trt, tmp_path):
    report = compiled(tmp_path)
    data = report.data
    jsonschema.validate(json.loads(json.dumps(data, allow_nan=False)), SCHEMA)
    assert [hop["name"] for hop in data["fidelity"]["hops"]][-2:] == ["export", "engine"]
    assert data["fidelity"]["hops"][-1]["rel"] < 1e-6
    assert data["engine"] == {
        "status": "built",
        "reason": None,
        "hint": None,
        "node": None,
        "not_run": None,
        "layers": [],
    }
    gpu = data["latency"]["gpu"]
    rows = [(run["name"], run["runtime"], run["batch"], run["device"], run["p50_ms"]) for run in gpu["runs"]]
    assert rows == [("compiled", "tensorrt", batch, "Fake GPU", 2.0) for batch in (1, 4)]
    assert gpu["settled"]
    assert any("ONNX Runtime's CUDA provider was not timed" in note for note in gpu["notes"])
    # Each row carries its device, and ratios are of those on the CPU.
    assert {run["device"] for run in data["latency"]["runs"]} == {data["latency"]["device"]}
    assert "on the GPU, ms a batch, Fake GPU" in lines(report)
    assert "not run" not in lines(report)
    # The folder as written opens: what the loader asks for is there.
    assert open_engine(report.folder).outputs == list(data["fidelity"]["outputs"])


def test_an_engine_that_computes_something_else_misses_the_budget(trt, tmp_path):
    trt.function = lambda arrays: np.zeros((len(arrays["images"]), 3)) + np.arange(3)
    with pytest.raises(FidelityError, match="output-error"):
        compiled(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_an_engine_for_another_gpu_is_built_and_not_run(trt, tmp_path):
    trt.cuda.capability = (9, 0)
    (tmp_path / "model.engine").write_bytes(engine_bytes())
    artifact = EngineArtifact(tmp_path / "model.engine", "tensorrt 10.13.3.9", ("SM89",), {})
    result, runner = open_built(EngineResult("built", artifact))
    assert (result.status, result.artifact, runner, trt.seen) == ("built", artifact, None, [])
    assert "is for SM89, and this GPU (Fake GPU) is SM90" in result.not_run
    assert engine_note(result).endswith("for SM89; built, not run")


def test_where_there_is_no_engine_none_is_opened(trt):
    for result in (EngineResult("omitted"), EngineResult("failed", reason="why")):
        assert open_built(result) == (result, None)


def test_without_a_gpu_one_line_says_so(trt, tmp_path, monkeypatch):
    fake_gpu.install(monkeypatch, None, trt)
    report = compiled(tmp_path)
    jsonschema.validate(json.loads(json.dumps(report.data, allow_nan=False)), SCHEMA)
    assert lines(report).count("The engine was built and not run: an engine needs an NVIDIA GPU with its driver") == 1
    assert report.data["latency"]["gpu"] is None


def test_what_could_not_be_run_stands_in_notes_once(trt, tmp_path):
    trt.uncapturable = True
    engine = EngineRunner(trt, engine_bytes(), "model.engine", "tensorrt", Cuda())
    samples = Samples({"images": torch.rand(3, 4, 4)})
    gpu = measure_gpu(OnnxArtifact(tmp_path / "model.onnx", 18), engine, samples, (1, 8), 0.0, 0)
    of_onnx_runtime, of_engine = gpu.notes
    assert of_onnx_runtime.startswith("ONNX Runtime's CUDA provider was not timed: ")
    assert of_engine.startswith("model.engine is launched, without a CUDA graph")
    assert [(run.name, run.batch, run.p50_ms) for run in gpu.runs] == [("compiled", 1, 2.0), ("compiled", 8, 2.0)]
