"""A compiled folder is opened and called from Python, without torch."""

import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.folders import tamper

import asapc
from asapc.errors import BuildError, CheckpointError, DependencyError, InputError, OptionError
from asapc.runtime import onnx
from asapc.runtime.model import load


@pytest.fixture(scope="module")
def folder(point_model) -> Path:
    """A small model on sets of 24 points, compiled for 8 to 48 of them and batches of up to 16."""
    _, compile_it = point_model
    return compile_it(dynamic="batch=1:16,seq=8:48", target="onnx").folder


@pytest.fixture(scope="module")
def points(folder) -> np.ndarray:
    return np.load(folder / "samples.npz")["points"]


def test_it_returns_what_the_folder_says_it_returns(folder, points):
    expected = np.load(folder / "expected.npz")
    with asapc.load(folder, device="cpu") as model:
        outputs = model(points)
        assert outputs.keys() == set(expected.files) == {info.name for info in model.outputs}
        for name, value in outputs.items():
            np.testing.assert_array_equal(value, expected[name])


def test_it_says_where_and_what_it_runs(folder):
    model = load(folder, device="cpu")
    assert model.device == "cpu"
    assert model.runtime.startswith("onnxruntime ")
    [info] = model.inputs
    assert (info.name, info.dtype, info.shape) == ("points", "float32", ("batch", "seq", 3))
    assert model.axes == {"batch": (1, 16), "seq": (8, 48)}
    assert "points (batch of 1 to 16, seq of 8 to 48, 3) float32" in repr(model)
    assert "onnxruntime" in repr(model)


def test_inputs_come_by_position_by_keyword_or_as_a_mapping(folder, points):
    model = load(folder)
    (by_position,) = model(points).values()
    for outputs in (model(points=points), model({"points": points}), model(np.load(folder / "samples.npz"))):
        np.testing.assert_array_equal(next(iter(outputs.values())), by_position)


@pytest.mark.parametrize(("batch", "length"), [(1, 8), (7, 24), (16, 48)])
def test_batches_and_lengths_are_open(folder, batch, length, point_model):
    teacher, _ = point_model
    points = torch.randn(batch, length, 3)
    (logits,) = load(folder)(points).values()
    with torch.no_grad():
        torch.testing.assert_close(logits, teacher(points), rtol=1e-3, atol=1e-3)  # compiled exactly


def test_tensors_in_give_tensors_out(folder, points):
    model = load(folder)
    (from_array,), (from_tensor,) = (model(value).values() for value in (points, torch.from_numpy(points)))
    assert isinstance(from_array, np.ndarray)
    assert isinstance(from_tensor, torch.Tensor)
    np.testing.assert_array_equal(from_tensor.numpy(), from_array)
    (negative,) = model(torch.from_numpy(-points)._neg_view()).values()
    torch.testing.assert_close(negative, from_tensor)
    (tracked,) = model(torch.from_numpy(points).requires_grad_()).values()
    assert not tracked.requires_grad


def test_only_casts_that_lose_nothing_are_made_and_that_of_numpys_default(folder, points):
    model = load(folder)
    (logits,) = model(points).values()
    for same in (points.astype(np.float64), points.astype(">f4"), np.asfortranarray(points)):
        np.testing.assert_array_equal(next(iter(model(same).values())), logits)
    next(iter(model(points.astype(np.float16)).values()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, points: model(), "points is missing"),
        (lambda model, points: model(points, points), "2 inputs for a model of 1"),
        (lambda model, points: model(points, points=points), "given by position and by name"),
        (lambda model, points: model(cloud=points), "has no input cloud"),
        (lambda model, points: model(points.tolist()), "points is a list"),
        (lambda model, points: model(points[0]), "takes (batch of 1 to 16, seq of 8 to 48, 3) float32"),
        (lambda model, points: model(points[:, :, :2]), "points is (4, 24, 2)"),
        (lambda model, points: model(points[:, :7]), "points is (4, 7, 3)"),
        (lambda model, points: model(np.repeat(points, 5, 0)), "points is (20, 24, 3)"),
        (lambda model, points: model(points[:0]), "points is (0, 24, 3)"),
        (lambda model, points: model(points.astype(int)), "points is int64"),
        (lambda model, points: model(points > 0), "points is bool"),
        (lambda model, points: model(points.astype(complex)), "points is complex128"),
        (lambda model, points: model(torch.zeros(1, 24, 3, dtype=torch.bfloat16)), "points is a torch.bfloat16"),
        (lambda model, points: model(points.astype(object)), "points is object"),
        (lambda model, points: model(np.ma.masked_array(points, points > 0)), "points has masked entries"),
        (lambda model, points: model(torch.zeros(1, 24, 3).to_sparse()), "torch.sparse_coo"),
        (lambda model, points: model(torch.zeros(1, 24, 3, device="meta")), "on meta"),
        (lambda model, points: model(torch.zeros(1, 24, 3, dtype=torch.cfloat).conj()), "points is complex64"),
        (lambda model, points: model.warmup(0), "a warm-up cannot be 0"),
        (lambda model, points: model.warmup("3"), "a warm-up cannot be '3'"),
        (lambda model, points: model.warmup(True), "a warm-up cannot be True"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(call, message, folder, points):
    with pytest.raises(InputError) as caught:
        call(load(folder), points)
    assert message in str(caught.value)
    assert caught.value.hint


def test_the_remedy_for_a_dtype_is_what_the_caller_has(folder, points):
    tensor = torch.ones(1, 24, 3, dtype=torch.int32)
    for value, remedy in ((points.astype(int), ".astype('float32')"), (tensor, ".to(torch.float32)")):
        with pytest.raises(InputError) as caught:
            load(folder)(value)
        assert remedy in caught.value.hint


def test_threads_share_a_model(folder):
    model = load(folder, threads=1)
    batches = [np.random.default_rng(i).normal(size=(1 + i % 7, 8 + i % 5, 3)).astype(np.float32) for i in range(40)]
    alone = [next(iter(model(batch).values())) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for one, together in zip(alone, pool.map(model, batches), strict=True):
            np.testing.assert_array_equal(next(iter(together.values())), one)


def test_a_closed_model_says_so(folder, points):
    with load(folder).warmup(batch=3) as model:
        model(points)
    assert "closed" in repr(model)
    with pytest.raises(InputError, match="is closed"):
        model(points)


def test_a_pickle_opens_the_folder_anew(folder, points, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = load(folder.name, device="cpu", threads=1)
    pickled = pickle.dumps(model)
    monkeypatch.chdir(tmp_path)
    other = pickle.loads(pickled)
    assert other.options == ("cpu", 1)
    np.testing.assert_array_equal(next(iter(other(points).values())), next(iter(model(points).values())))
    model.close()
    with pytest.raises(InputError, match="is closed"):
        pickle.dumps(model)
    other(points)


def test_a_folder_that_changed_is_not_opened(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.OnnxSession, "__init__", lambda *args: pytest.fail("it was opened"))
    for name in ("model.onnx", "expected.npz", "README.md"):
        copy = tamper(folder, tmp_path / name, "report.json", lambda report: None)
        (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load(copy)


def test_what_is_no_folder_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nothing")
    (tmp_path / "subfolder").mkdir()
    with pytest.raises(CheckpointError, match="not written by"):
        load(tmp_path)
    copy = tamper(folder, tmp_path / "copy", "report.json", lambda report: None)
    (copy / ".DS_Store").touch()
    with pytest.raises(CheckpointError, match=r"does not list its \.DS_Store") as caught:
        load(copy)
    assert "remove it" in caught.value.hint
    with pytest.raises(CheckpointError) as caught:
        load(folder / "model.onnx")
    assert "load_checkpoint" in caught.value.hint
    with pytest.raises(OptionError, match="not a int"):
        load(3)


def test_a_device_that_is_not_there_is_said(folder, monkeypatch):
    monkeypatch.setattr(onnx, "count_gpus", lambda: 0)
    with pytest.raises(DependencyError, match="no NVIDIA GPU"):
        load(folder, device="cuda")
    assert "GPU" in load(folder).passed_over["cuda"]
    for options in ({"device": "tpu"}, {"threads": -1}, {"threads": True}, {"threads": 10**6}):
        with pytest.raises(OptionError):
            load(folder, **options)


def test_where_cuda_cannot_start_the_cpu_is_taken(folder, points, monkeypatch):
    """ONNX Runtime falls back without a word where the driver is there and CUDA's libraries are not."""
    monkeypatch.setattr(onnx, "count_gpus", lambda: 1)
    monkeypatch.setattr(onnx, "OnnxSession", fallen_back(onnx.OnnxSession))
    model = load(folder)
    assert model.device == "cpu"
    assert "CUDA" in model.passed_over["cuda"]
    model(points)


def fallen_back(session):
    """Sessions on the CPU, whatever was asked for."""
    return lambda path, threads, providers: session(path, threads, ["CPUExecutionProvider"])


def test_a_file_that_the_runtime_refuses_is_an_error_of_the_file(folder, tmp_path):
    copy = tamper(folder, tmp_path / "out", "report.json", lambda report: None)
    (copy / "model.onnx").write_bytes(b"no model")
    tampered = tamper(copy, tmp_path / "listed", "report.json", lambda report: None)
    with pytest.raises(BuildError, match=re.escape("model.onnx")):
        load(tampered)


def test_a_manifest_that_lies_about_the_model_is_an_error_of_the_call(folder, points, tmp_path):
    copy = tamper(folder, tmp_path / "out", "manifest.json", lambda m: m["inputs"][0].update(name="other"))
    with pytest.raises(BuildError, match="cannot run"):
        load(copy)(points)


CODE = """
import sys, numpy, asapc
with asapc.load({folder!r}) as model:
    model.warmup()
    outputs = model(numpy.load({samples!r}))
    text = repr(model)
print(sorted({{"torch", "onnx", "scipy", "rich"}} & sys.modules.keys()))
"""


def test_the_runtime_imports_no_torch(folder, tmp_path):
    code = CODE.format(folder=str(folder), samples=str(folder / "samples.npz"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_manifest_lists_interface_and_files(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"] == [{"name": "points", "dtype": "float32", "shape": ["batch", "seq", 3]}]
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"samples.npz", "expected.npz", "README.md"} <= manifest["files"].keys()
