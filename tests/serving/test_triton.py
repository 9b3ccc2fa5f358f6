"""A compiled folder becomes a model of Triton's repository: whole, or not at all."""

import errno
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.folders import relist

from asapc.commands.package import package
from asapc.errors import BuildError, CheckpointError, DependencyError, OptionError, OutputError, SamplesError
from asapc.loading.manifest import read_manifest
from asapc.serving import triton
from asapc.serving.triton import model_config, package_triton, parse


def names(path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_the_configuration_says_what_the_model_takes(folder, tmp_path):
    package_triton(folder, tmp_path / "repository", "points", "onnxruntime")
    model = tmp_path / "repository" / "points"
    config = parse(model / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("points", "onnxruntime", 16)
    assert [(i.name, list(i.dims)) for i in config.input] == [("points", [-1, 3])]
    assert config.HasField("dynamic_batching")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert config.parameters["model_sha256_of_version_1"].string_value == manifest["model_sha256"]
    [warmup] = config.model_warmup
    sample = np.load(folder / "samples.npz")["points"][0]
    assert list(warmup.inputs["points"].dims) == list(sample.shape)
    assert (model / "warmup" / "1.0").read_bytes() == sample.tobytes()
    assert names(model) == {"config.pbtxt", "warmup/1.0", "1/model.onnx", "1/manifest.json"}


@pytest.mark.parametrize(
    ("shape", "limits", "batch", "dims"),
    [
        (["batch", 3], {"batch": {"low": 1, "high": None}}, 64, [3]),
        (["batch"], {"batch": {"low": 1, "high": 8}}, 8, [1]),
        ([4, 3], {}, 0, [4, 3]),
        (["batch", 3], {"batch": {"low": 2, "high": 8}}, 0, [-1, 3]),
    ],
)
def test_the_batch_is_open_only_where_one_sample_is_a_batch(folder, tmp_path, shape, limits, batch, dims):
    of = {"name": "x", "dtype": "float32", "shape": shape}
    manifest = {"inputs": [of], "outputs": [of], "axes": limits, "asapc": "0", "model_sha256": "0"}
    config = model_config(tmp_path, manifest, "x", "onnxruntime", 1)
    assert (config.max_batch_size, list(config.input[0].dims)) == (batch, dims)
    assert config.HasField("dynamic_batching") == bool(batch)


def test_versions_stand_beside_each_other(folder, tmp_path):
    paths = [package_triton(folder, tmp_path, "points", "python") for _ in range(2)]
    assert [path.name for path in paths] == ["1", "2"]
    assert read_manifest(paths[1] / "model.asap")
    with pytest.raises(OutputError, match="exists already"):
        package_triton(folder, tmp_path, "points", "python", version=2)
    assert package_triton(folder, tmp_path, "points", "python", version=2, force=True) == paths[1]
    config = parse(tmp_path / "points" / "config.pbtxt")
    assert {"model_sha256_of_version_1", "model_sha256_of_version_2"} < set(config.parameters)
    with pytest.raises(OutputError, match="another backend"):
        package_triton(folder, tmp_path, "points", "onnxruntime")
    assert {path.name for path in (tmp_path / "points").iterdir()} == {"1", "2", "config.pbtxt", "warmup"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(folder, tmp_path, monkeypatch, error, earlier):
    repository = tmp_path / "repository"
    if earlier:
        package_triton(folder, repository, "points", "python")
    before = names(tmp_path)

    def fail(*_):
        raise error

    write = triton.write_version
    monkeypatch.setattr(triton, "write_version", lambda *arguments: (write(*arguments), fail()))
    with pytest.raises((OutputError, KeyboardInterrupt)):
        package_triton(folder, repository, "points", "python")
    assert names(tmp_path) == before


def warmup_of(model) -> dict[str, tuple[int, int]]:
    """Sizes in bytes of the warm-up's files: as the configuration asks for them, and as they are."""
    entries = [entry for warmup in parse(model / "config.pbtxt").model_warmup for entry in warmup.inputs.values()]
    asked = {entry.input_data_file: 4 * int(np.prod(entry.dims)) for entry in entries}
    sizes = {file.name: file.stat().st_size for file in (model / "warmup").glob("*")}
    return {name: (asked.get(name, 0), sizes.get(name, 0)) for name in asked | sizes}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("lengths", [(24, 12), (None, 12), (24, None)])
def test_the_warm_up_is_that_of_the_latest_version(folder, tmp_path, lengths, version):
    for number, length in enumerate(lengths):
        other = shutil.copytree(folder, tmp_path / f"{number}.asap")
        if length is None:
            (other / "samples.npz").unlink()
        else:
            np.savez(other / "samples.npz", points=np.zeros((4, length, 3), "float32"))
        relist(other)
        package_triton(other, tmp_path / "r", "points", "python", version=version if number else 1, force=True)
    size = 12 * (lengths[1] or 0)
    assert warmup_of(tmp_path / "r" / "points") == ({f"{version}.0": (size, size)} if size else {})


def test_a_version_of_the_python_backend_runs_on_its_own_files_alone(folder, tmp_path):
    path = package_triton(folder, tmp_path / "r", "points", "python")
    code = f"""
import sys
sys.path.insert(0, {str(path)!r})
import asapc, numpy
from asapc.runtime.triton import TritonPythonModel
model = TritonPythonModel()
model.initialize({{"model_repository": {str(path.parent)!r}, "model_version": "1"}})
print(*asapc.__path__, model.model(numpy.zeros((2, 24, 3), "float32")).keys(), "torch" in sys.modules)
"""
    process = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    outputs = np.load(folder / "expected.npz").files
    assert process.stdout == f"{path / 'asapc'} dict_keys({outputs}) False\n", process.stderr


def test_of_two_packagings_at_once_each_is_whole_or_refused(folder, tmp_path):
    command = [sys.executable, "-m", "asapc.cli", "package", folder, "--triton", tmp_path / "r", "--name", "points"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    whole = [process.returncode == 0 for process in processes]
    assert any(whole)
    assert all(good or "exists already" in error for good, error in zip(whole, errors, strict=True)), errors
    versions = {path.name for path in (tmp_path / "r" / "points").iterdir()} - {"config.pbtxt", "warmup"}
    assert len(versions) == sum(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"r"}


def test_versions_packaged_at_once_keep_each_others_hash(folder, tmp_path, monkeypatch):
    package_triton(folder, tmp_path, "points", "python")
    merge = triton.merge
    monkeypatch.setattr(triton, "merge", lambda *arguments: (merge(*arguments), time.sleep(0.2)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda number: package_triton(folder, tmp_path, "points", "python", number), (2, 3, 4)))
    parameters = parse(tmp_path / "points" / "config.pbtxt").parameters
    assert {f"model_sha256_of_version_{number}" for number in range(1, 5)} < set(parameters)


@pytest.mark.parametrize("full", [False, True])
def test_where_nothing_can_be_moved_into_the_repository_a_model_grows_in_it(folder, tmp_path, monkeypatch, full):
    package_triton(folder, tmp_path / "other", "points", "python")
    (tmp_path / "r").mkdir()
    monkeypatch.setattr(triton, "movable", lambda repository: False)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if full:
        monkeypatch.setattr(triton, "write_warmup", fail)
        with pytest.raises(OutputError):
            package_triton(folder, tmp_path / "r", "points", "python")
        assert not list((tmp_path / "r").iterdir())
    else:
        package_triton(folder, tmp_path / "r", "points", "python")
        assert names(tmp_path / "r") == names(tmp_path / "other")


def test_nothing_can_be_moved_into_another_file_system(tmp_path):
    assert triton.movable(tmp_path)
    assert triton.movable(tmp_path / "new")
    assert not triton.movable(Path("/proc"))


def test_what_triton_does_not_take_is_refused(folder, tmp_path):
    for name, backend, error in [("a/b", "python", "called"), ("a", "torch", "backend"), ("a", "tensorrt", "engine")]:
        with pytest.raises(OptionError, match=error):
            package_triton(folder, tmp_path / "r", name, backend)
    with pytest.raises(CheckpointError):
        package_triton(tmp_path, tmp_path / "r", "a", "python")
    with pytest.raises(OptionError, match="nothing to package for"):
        package(folder, None)
    assert not (tmp_path / "r").exists()


def test_versions_of_others_are_not_replaced(folder, tmp_path):
    (tmp_path / "points" / "1").mkdir(parents=True)
    with pytest.raises(OutputError, match="not written by asapc"):
        package_triton(folder, tmp_path, "points", "python", version=1, force=True)


def test_versions_that_triton_cannot_read_are_refused(folder, tmp_path):
    with pytest.raises(OptionError, match="a version cannot be"):
        package_triton(folder, tmp_path, "points", "python", version=2**63)


def test_a_file_in_the_place_of_the_model_is_not_for_force(folder, tmp_path):
    (tmp_path / "points").touch()
    with pytest.raises(OutputError, match="is no folder"):
        package_triton(folder, tmp_path, "points", "python", force=True)


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_a_full_disk_is_called_so(folder, tmp_path, monkeypatch, backend):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OutputError, match="no space left on device"):
        package_triton(folder, tmp_path / "r", "points", backend)
    assert not (tmp_path / "r").exists()


def test_without_a_server_or_samples_the_smoke_test_says_so_and_nothing_is_written(folder, tmp_path):
    with pytest.raises(DependencyError, match="holds no Triton server"):
        package(folder, tmp_path / "r", backend="python", smoke=True, server=tmp_path)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "samples.npz").unlink()
    with pytest.raises(SamplesError, match="no samples to send"):
        package(other, tmp_path / "r", backend="python", smoke=True)
    assert not (tmp_path / "r").exists()


def test_a_failed_smoke_test_says_what_was_written(folder, tmp_path):
    server = tmp_path / "tritonserver"
    server.write_text("#!/bin/sh\necho failed to load the model >&2\n")
    server.chmod(0o755)
    with pytest.raises(BuildError, match=r"r/points/1 was written, .* the server ended .* failed to load the model"):
        package(folder, tmp_path / "r", "points", backend="python", smoke=True, server=server)


def test_without_tritonclient_the_command_to_install_it_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    with pytest.raises(DependencyError) as caught:
        package_triton(folder, tmp_path, "points", "python")
    assert "asapc[serving]" in caught.value.hint
