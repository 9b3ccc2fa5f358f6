"""Engines that do not belong to their folder, their TensorRT or this machine never reach TensorRT."""

import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import fake_gpu
from helpers.command import write_checkpoint
from helpers.engine_folders import with_engine
from helpers.fake_gpu import FakeCuda, FakeTensorRT, engine_bytes
from helpers.folders import tamper
from helpers.paths import ROOT

from asapc.backends.tensorrt.loader import MAGIC, open_checked, open_engine, runs
from asapc.commands.compile import compile_model
from asapc.config import CompileConfig
from asapc.errors import CheckpointError, DependencyError
from asapc.loading.folder import read_folder
from asapc.runtime.model import load

BUILDER = "tensorrt 10.13.3.9"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    path = write_checkpoint(folder / "model.pt", iterations=2)
    options = {"level": 1, "fidelity": ("agreement>=0",), "batches": (1,), "seconds": 0.05, "target": "onnx"}
    compile_model(path, CompileConfig(out=folder / "out", **options))
    return folder / "out"


@pytest.fixture
def trt(monkeypatch) -> FakeTensorRT:
    gpu = FakeCuda()
    fake = FakeTensorRT(gpu)
    fake_gpu.install(monkeypatch, gpu, fake)
    return fake


def refused(folder: Path, trt: FakeTensorRT, kind: type[Exception] = CheckpointError) -> str:
    """The engine is refused, in one line with a hint, before native code has seen it; returns the line."""
    with pytest.raises(kind) as caught:
        open_engine(folder)
    assert trt.seen == []
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_engine_of_its_folder_runs(compiled, trt, tmp_path):
    runner = open_engine(with_engine(compiled, tmp_path / "out", engine_bytes()))
    x = np.ones((2, 4, 4), np.float32)
    np.testing.assert_array_equal(runner.run({"images": x})["logits"], 2 * x)
    assert trt.seen == [engine_bytes()]
    assert runner.runtime == "tensorrt"


def test_the_runtime_takes_the_engine_and_gives_it_no_more_samples_than_it_takes_at_once(compiled, trt, tmp_path):
    (output,) = load(compiled, "cpu").outputs
    data = engine_bytes(outputs={output.name: {"dtype": "FLOAT", "shape": ["batch", 4, 4]}})
    with load(with_engine(compiled, tmp_path / "out", data)) as model:
        assert (model.runtime, model.passed_over) == ("tensorrt", {})
        x = np.random.default_rng(0).random((11, 4, 4), dtype=np.float32)
        np.testing.assert_array_equal(model(x)[output.name], 2 * x)


def test_the_runtime_says_why_it_passes_an_engine_over(compiled, trt, tmp_path):
    with load(with_engine(compiled, tmp_path / "out", engine_bytes(), targets=["SM120"])) as model:
        assert "is for SM120" in model.passed_over["tensorrt"]
        assert model.device == "cpu"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data[:40] + b"\xff" + data[41:],
        lambda data: engine_bytes({"images": {"dtype": "FLOAT", "low": [1, 4, 4], "high": [9, 4, 4]}}),
    ],
    ids=["a byte short", "half of it", "empty", "a byte longer", "a byte changed", "of another folder"],
)
def test_an_engine_that_is_damaged_or_of_another_folder_is_refused(change, compiled, trt, tmp_path):
    folder = with_engine(compiled, tmp_path / "out", engine_bytes())
    (folder / "model.engine").write_bytes(change(engine_bytes()))
    assert "model.engine: it changed since it was written" in refused(folder, trt)


def test_a_report_that_states_another_hash_than_the_manifest_is_refused(compiled, trt, tmp_path):
    folder = with_engine(compiled, tmp_path / "in", engine_bytes())

    def change(report):
        report["artifacts"][-1]["sha256"] = "0" * 64

    assert "model.engine" in refused(tamper(folder, tmp_path / "out", "report.json", change), trt)


def test_an_engine_that_vanishes_meanwhile_is_refused(compiled, trt, tmp_path):
    folder = with_engine(compiled, tmp_path / "out", engine_bytes())
    report = read_folder(folder)
    (folder / "model.engine").unlink()
    with pytest.raises(CheckpointError, match=r"model\.engine: no such file"):
        open_checked(folder, report)


def test_an_engine_outside_the_folder_is_refused(compiled, trt, tmp_path):
    folder = with_engine(compiled, tmp_path / "in", engine_bytes())
    (tmp_path / "other.engine").write_bytes(engine_bytes())

    def change(report):
        report["artifacts"][-1]["path"] = "../other.engine"

    refused(tamper(folder, tmp_path / "out", "report.json", change), trt)


def test_a_file_that_changes_after_the_folder_was_read_is_refused(compiled, trt, tmp_path, monkeypatch):
    folder = with_engine(compiled, tmp_path / "out", engine_bytes())
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"ftrt{}" if path.name == "model.engine" else read_bytes(path))
    assert "it changed since it was written" in refused(folder, trt)


def test_what_is_no_engine_at_all_is_refused_though_its_hash_fits(compiled, trt, tmp_path):
    onnx = (compiled / "model.onnx").read_bytes()
    for number, data in enumerate((b"f", b"not an engine", onnx)):
        folder = with_engine(compiled, tmp_path / str(number), data)
        assert f"it is no engine of {BUILDER}" in refused(folder, trt)


def test_an_engine_of_another_version_is_refused_with_both_versions(compiled, trt, tmp_path):
    for number, version in enumerate(("10.13.3.8", "10.14.0.1", "11.4.1.5", "9.0.0", "")):
        folder = with_engine(compiled, tmp_path / str(number), engine_bytes(), f"tensorrt {version}")
        assert f"was built by tensorrt {version}, and this is tensorrt 10.13.3.9" in refused(folder, trt)


def test_an_engine_of_the_other_product_is_refused(compiled, trt, tmp_path):
    folder = with_engine(compiled, tmp_path / "rtx", engine_bytes(), "tensorrt-rtx 1.7.1.116")
    assert "needs tensorrt-rtx 1.7.1.116, which cannot be imported" in refused(folder, trt, DependencyError)
    folder = with_engine(compiled, tmp_path / "other", engine_bytes(), "openvino 2026.1")
    assert "was built by openvino 2026.1, which is no TensorRT" in refused(folder, trt)


def test_an_engine_for_other_gpus_is_refused_with_both_architectures(compiled, trt, tmp_path):
    folder = with_engine(compiled, tmp_path / "out", engine_bytes(), targets=("SM80", "SM120"))
    message = refused(folder, trt)
    assert "is for SM80, SM120, and this GPU (Fake GPU) is SM89" in message


def test_an_engine_of_another_system_is_refused(compiled, trt, tmp_path):
    folder = with_engine(compiled, tmp_path / "out", engine_bytes(), platform="Windows-AMD64")
    here = f"{platform.system()}-{platform.machine()}"
    assert f"was built on Windows-AMD64, and this is {here}" in refused(folder, trt)


def test_what_is_lifted_is_lifted_and_no_more(compiled, trt, tmp_path):
    cases = (
        ("tensorrt 10.9.0.1", ["SM89"], ["version"], True),
        ("tensorrt 10.14.0.1", ["SM89"], ["version"], False),  # later than what is installed
        (BUILDER, ["SM80"], ["hardware"], True),
        (BUILDER, ["SM80"], ["version"], False),
        ("tensorrt 10.9.0.1", ["SM89"], ["hardware"], False),
    )
    for number, (builder, targets, compatible, taken) in enumerate(cases):
        trt.seen.clear()
        folder = with_engine(compiled, tmp_path / str(number), engine_bytes(), builder, targets, compatible)
        if taken:
            open_engine(folder)
            assert trt.seen
        else:
            refused(folder, trt)


@pytest.mark.parametrize(
    ("installed", "built", "compatible", "result"),
    [
        ("10.13.3.9", "10.13.3.9", False, True),
        ("10.14.0", "10.13.3.9", False, False),
        ("10.14.0", "10.13.3.9", True, True),
        ("10.9.0", "10.13.3.9", True, False),
        ("11.0.0", "10.13.3.9", True, True),
        ("12.0.0", "10.13.3.9", True, False),
        ("1.7.1.116", "1.7.1.116", False, True),
        ("10.14.0", "10.13.0rc1", True, True),
        ("10.14.0", "", True, False),
    ],
)
def test_versions(installed, built, compatible, result):
    assert runs(installed, built, compatible) is result


def test_a_folder_without_an_engine_says_why(compiled, trt):
    assert "holds no engine: none was asked for" in refused(compiled, trt)


def test_without_a_gpu_or_tensorrt_nothing_is_opened(compiled, trt, tmp_path, monkeypatch):
    folder = with_engine(compiled, tmp_path / "out", engine_bytes())
    fake_gpu.install(monkeypatch, None, trt)
    assert "needs an NVIDIA GPU" in refused(folder, trt, DependencyError)
    monkeypatch.undo()
    fake_gpu.install(monkeypatch, trt.cuda)
    assert f"needs {BUILDER}, which cannot be imported" in refused(folder, trt, DependencyError)


def test_a_real_engine_is_refused_here_for_its_reason_alone(compiled, tmp_path, monkeypatch):
    """Built by NVIDIA's compiler: its first bytes are as `MAGIC` has them, and the installed version takes it."""
    rtx = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("asapc.backends.tensorrt.cuda.driver_loads", lambda: False)
    data = small_engine(rtx)
    assert data.startswith(MAGIC, 1)
    builder = f"tensorrt-rtx {rtx.__version__}"
    folder = with_engine(compiled, tmp_path / "out", data, builder)
    with pytest.raises(DependencyError, match="needs an NVIDIA GPU"):
        open_engine(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=re.escape(f"this is tensorrt-rtx {rtx.__version__}")):
        open_engine(with_engine(compiled, folder, data, "tensorrt-rtx 1.6.0.1"))


def small_engine(trt) -> bytes:
    """An engine that doubles its input, for one GPU."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (2, 2))
    network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return bytes(builder.build_serialized_network(network, config))


def snippet() -> str:
    """The page's program that runs an engine."""
    page = (ROOT / "docs" / "tensorrt.md").read_text()
    return next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "open_engine" in code)


def test_the_documented_program_runs(compiled, trt, tmp_path, monkeypatch, capsys):
    images = {"images": {"dtype": "FLOAT", "low": [1, 8, 8], "high": [32, 8, 8]}}
    data = engine_bytes(images, {"logits": {"dtype": "FLOAT", "shape": ["batch", 8, 8]}})
    with_engine(compiled, tmp_path / "digits.asap", data)
    np.savez(tmp_path / "samples.npz", images=np.zeros((40, 8, 8), np.uint8))
    monkeypatch.chdir(tmp_path)
    assert len([line for line in snippet().splitlines() if line]) <= 15
    exec(compile(snippet(), "tensorrt.md", "exec"), {})
    assert "Fake GPU tensorrt {'images': 'float32 (1 to 32, 8, 8)'}" in capsys.readouterr().out
    assert trt.cuda.memory == {}
