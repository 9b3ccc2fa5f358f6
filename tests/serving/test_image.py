"""A compiled folder becomes a folder that a container image is built from: whole, or not at all."""

import errno
import filecmp
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from asapc.commands.package import package
from asapc.errors import CheckpointError, DependencyError, OptionError, OutputError, SamplesError
from asapc.loading.manifest import read_manifest
from asapc.serving import image
from asapc.serving.image import package_image
from asapc.serving.image_smoke import smoke_image

NAMES = {
    *("Containerfile", "README.md", "asapc", "model.asap", "requirements.in", "requirements.txt"),
    *("serve.py", "settings.toml"),
}


@pytest.fixture(scope="module")
def packaged(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("image") / "out"
    package_image(folder, target, "Point_sets.1")
    return target


def test_the_folder_holds_what_its_containerfile_copies(folder, packaged):
    assert {path.name for path in packaged.iterdir()} == NAMES
    copied = re.findall(r"^COPY (.+) \S+$", (packaged / "Containerfile").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} == NAMES - {
        *("Containerfile", "README.md", "requirements.in")
    }
    assert read_manifest(packaged / "model.asap") == read_manifest(folder)
    assert not filecmp.dircmp(folder, packaged / "model.asap").diff_files


def test_the_settings_say_what_the_model_takes(packaged):
    settings = tomllib.loads((packaged / "settings.toml").read_text())
    assert (settings["model"]["name"], settings["model"]["batch"]) == ("Point_sets.1", 16)
    assert set(settings) == {"model", "limits", "log", "kserve"}
    assert "--tag point-sets-1 ." in (packaged / "README.md").read_text()


def test_the_lock_names_one_version_and_hashes_of_all_that_is_required(packaged):
    lock = (packaged / "requirements.txt").read_text()
    entries = re.findall(r"^([a-z0-9-]+)==\S+(?: ;.*)? \\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[a-z]", lock, re.MULTILINE)) > 20
    required = [line for line in (packaged / "requirements.in").read_text().split("\n") if line[:1].isalpha()]
    assert {*required} <= {*entries}


def test_the_runtime_is_imported_from_the_folder_alone(packaged, tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["torch"] = None
import asapc.runtime.kserve
import asapc
model = asapc.load(sys.argv[1] + "/model.asap", "cpu")
print(asapc.__path__[0], *model({"points": __import__("numpy").zeros((2, 24, 3), "float32")}).keys())
"""
    command = [sys.executable, "-P", "-c", code, packaged]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.stdout.split()[0] == str(packaged / "asapc"), process.stderr


def test_only_its_own_folders_are_replaced_and_by_force_alone(folder, packaged, tmp_path):
    target = tmp_path / "out"
    package_image(folder, target, "a")
    with pytest.raises(OutputError, match="exists already"):
        package_image(folder, target, "b")
    package_image(folder, target, "b", force=True)
    assert 'name = "b"' in (target / "settings.toml").read_text()
    (target / "notes.txt").touch()
    with pytest.raises(OutputError, match="did not write"):
        package_image(folder, target, "c", force=True)
    for other in (tmp_path / "other", tmp_path / "file"):
        other.mkdir() if other.name == "other" else other.touch()
        with pytest.raises(OutputError, match="did not write"):
            package_image(folder, other, "c", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other", "file"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(folder, tmp_path, monkeypatch, error, earlier):
    if earlier:
        package_image(folder, tmp_path / "out", "earlier")

    def fail(*_):
        raise error

    monkeypatch.setattr(image, "write_runtime", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        package_image(folder, tmp_path / "out", "later", force=True)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])
    assert not earlier or 'name = "earlier"' in (tmp_path / "out" / "settings.toml").read_text()


def test_what_cannot_be_packaged_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    for name in ("a/b", "", '"', "a\nb"):
        with pytest.raises(OptionError, match="called"):
            package_image(folder, out, name)
    with pytest.raises(CheckpointError):
        package_image(tmp_path, out, "a")
    for options in ({"triton": tmp_path / "r"}, {"backend": "python"}, {"version": 1}, {"server": tmp_path}):
        with pytest.raises(OptionError):
            package(folder, image=out, **options)
    assert not list(tmp_path.iterdir())


def test_without_a_server_or_samples_the_smoke_test_says_so(folder, packaged, tmp_path):
    with pytest.raises(DependencyError, match="holds no KServe server") as caught:
        smoke_image(folder, packaged, "Point_sets.1", tmp_path)
    assert str(packaged / "requirements.txt") in caught.value.hint
    with pytest.raises(SamplesError):
        smoke_image(tmp_path, packaged, "Point_sets.1", tmp_path)


def test_a_model_whose_first_axis_is_no_open_batch_gets_no_batching(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image, "batched", lambda interface: False)
    package_image(folder, tmp_path / "out", "a")
    assert tomllib.loads((tmp_path / "out" / "settings.toml").read_text())["model"]["batch"] == 1
    assert np.load(tmp_path / "out" / "model.asap" / "samples.npz").files
