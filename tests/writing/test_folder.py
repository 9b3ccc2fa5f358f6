"""Output appears whole or not at all, and never replaces something that asapc did not write."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.slow import slow

from asapc.errors import OutputError
from asapc.types.interface import AxisRange, Interface, TensorInfo
from asapc.writing.folder import output_file, output_folder, write_json, write_manifest

INTERFACE = Interface(
    (TensorInfo("x", "float32", ("batch", 3)),),
    (TensorInfo("y", "float32", ("batch",)),),
    {"batch": AxisRange(1, None)},
)


def written(path: Path) -> Path:
    """An output folder as an earlier run left it."""
    with output_folder(path, force=False) as folder:
        (folder / "old.onnx").write_text("old")
        write_manifest(folder, model_sha256="0" * 64, version="0.0.0", interface=INTERFACE)
    return path


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content, and every folder; hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "folder" for path in folder.rglob("*")
    }


def test_a_folder_holds_what_was_written_and_nothing_is_left_beside_it(tmp_path):
    with output_folder(tmp_path / "out", force=False) as folder:
        (folder / "model.onnx").write_text("new")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out": "folder", "out/model.onnx": "new"}


def test_a_file_holds_what_was_written_and_nothing_is_left_beside_it(tmp_path):
    with output_file(tmp_path / "model.pt", force=False) as file:
        file.write_text("new")
        assert not (tmp_path / "model.pt").exists()
    assert tree(tmp_path) == {"model.pt": "new"}


@pytest.mark.parametrize("kind", [output_folder, output_file])
@pytest.mark.parametrize("place", ["new", "a/new", "other/../new"])
def test_nothing_is_written_into_a_folder_of_ours(kind, place, tmp_path, monkeypatch):
    written(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="would stand in"), kind(tmp_path / "out" / place, force=True):
        pass
    assert tree(tmp_path) == before
    monkeypatch.chdir(tmp_path / "out")
    with kind(Path("../beside"), force=False) as partial:
        if not partial.is_dir():
            partial.touch()


def test_missing_parents_are_made(tmp_path):
    with output_folder(tmp_path / "a" / "b" / "out", force=False) as folder:
        (folder / "model.onnx").write_text("new")
    assert (tmp_path / "a" / "b" / "out" / "model.onnx").read_text() == "new"


def write_and_fail(kind, path: Path, error: type[BaseException], force: bool = False) -> None:
    with kind(path, force) as partial:
        (partial / "model.onnx" if kind is output_folder else partial).write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", [output_folder, output_file])
@pytest.mark.parametrize("place", ["out", "a/b/out"])
def test_a_failing_run_leaves_nothing_nor_parents_that_it_made(kind, error, place, tmp_path):
    with pytest.raises(error):
        write_and_fail(kind, tmp_path / place, error)
    assert tree(tmp_path) == {}


def test_a_failing_run_leaves_parents_that_were_there(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError):
        write_and_fail(output_folder, tmp_path / "a" / "out", RuntimeError)
    assert tree(tmp_path) == {"a": "folder"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_run_leaves_an_existing_folder_as_it_was(error, tmp_path):
    written(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(error):
        write_and_fail(output_folder, tmp_path / "out", error, force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_run_leaves_an_existing_file_as_it_was(error, tmp_path):
    (tmp_path / "model.pt").write_text("old")
    with pytest.raises(error):
        write_and_fail(output_file, tmp_path / "model.pt", error, force=True)
    assert tree(tmp_path) == {"model.pt": "old"}


def assert_refused(kind, path: Path, force: bool) -> OutputError:
    """Refused before the block runs, and nothing changes."""
    before = tree(path.parent) if path.parent.is_dir() else None
    with pytest.raises(OutputError) as caught, kind(path, force):
        pytest.fail("the work was begun")
    assert before is None or tree(path.parent) == before
    assert caught.value.hint
    return caught.value


def test_what_exists_is_not_replaced_without_force(tmp_path):
    written(tmp_path / "out")
    (tmp_path / "model.pt").write_text("old")
    assert "--force" in assert_refused(output_folder, tmp_path / "out", force=False).hint
    assert "--force" in assert_refused(output_file, tmp_path / "model.pt", force=False).hint


def test_force_replaces_a_folder_that_asapc_wrote(tmp_path):
    written(tmp_path / "out")
    with output_folder(tmp_path / "out", force=True) as folder:
        (folder / "model.onnx").write_text("new")
    assert tree(tmp_path) == {"out": "folder", "out/model.onnx": "new"}


@pytest.mark.parametrize("own", ["notes.txt", "results/run.csv", "old.onnx/weights.bin"])
def test_force_never_deletes_what_asapc_did_not_write_into_the_folder(own, tmp_path):
    out = written(tmp_path / "out")
    (out / "old.onnx").unlink()
    (out / own).parent.mkdir(exist_ok=True)
    (out / own).write_text("years of work")
    error = assert_refused(output_folder, out, force=True)
    assert str(error).endswith(f"and is not replaced: {own.split('/')[0]}")


def test_a_file_that_comes_into_the_folder_during_the_run_is_not_deleted(tmp_path):
    out = written(tmp_path / "out")

    def run_beside_a_user() -> None:
        with output_folder(out, force=True) as folder:
            (folder / "model.onnx").write_text("new")
            (out / "notes.txt").write_text("years of work")

    with pytest.raises(OutputError, match=r"notes\.txt"):
        run_beside_a_user()
    assert (out / "notes.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def replace_and_die(out: Path, renames: int) -> None:
    """Replace an output folder in a process that is killed before so many renames are done."""
    code = """
import os, signal, sys
from pathlib import Path
from asapc.writing.folder import output_folder
rename, left = Path.rename, int(sys.argv[2])
def rename_or_die(path, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return rename(path, target)
Path.rename = rename_or_die
with output_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "model.onnx").write_text("new")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(out), str(renames)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("renames", [slow(0), 1])
def test_a_kill_while_the_folder_is_replaced_loses_nothing(renames, tmp_path):
    out = written(tmp_path / "out")
    before = tree(tmp_path)
    replace_and_die(out, renames)
    assert out.exists() == (renames == 0)
    # Refused, since the earlier output is restored before anything else.
    with pytest.raises(OutputError, match="exists already"), output_folder(out, force=False):
        pytest.fail("the work was begun")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "why"), [(errno.ENOSPC, "no space left on device"), (errno.EFBIG, "file too large")]
)
def test_a_full_disk_is_said_to_be_one(number, why, tmp_path):
    with pytest.raises(OutputError, match=why), output_folder(tmp_path / "out", force=False):
        raise OSError(number, os.strerror(number))
    assert tree(tmp_path) == {}


def test_force_replaces_a_file(tmp_path):
    (tmp_path / "model.pt").write_text("old")
    with output_file(tmp_path / "model.pt", force=True) as file:
        file.write_text("new")
    assert tree(tmp_path) == {"model.pt": "new"}


@pytest.mark.parametrize(
    "files",
    [{}, {"thesis.txt": "years of work"}, {"manifest.json": '{"name": "a web app", "version": "3"}'}],
    ids=["empty", "papers", "another tool's manifest"],
)
def test_a_folder_that_asapc_did_not_write_is_never_replaced(files, tmp_path):
    (tmp_path / "out").mkdir()
    for name, text in files.items():
        (tmp_path / "out" / name).write_text(text)
    assert_refused(output_folder, tmp_path / "out", force=True)


def test_a_file_is_never_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    assert_refused(output_folder, tmp_path / "file", force=True)
    assert_refused(output_file, tmp_path / "folder", force=True)


def test_a_folder_that_appears_during_the_run_is_not_replaced_without_force(tmp_path):
    def run_beside_another() -> None:
        with output_folder(tmp_path / "out", force=False) as folder:
            (folder / "model.onnx").write_text("new")
            written(tmp_path / "out")

    with pytest.raises(OutputError):
        run_beside_another()
    assert (tmp_path / "out" / "old.onnx").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The tests run as root too, whom no permission keeps out: a file instead of the parent keeps out everyone.
@pytest.mark.parametrize("kind", [output_folder, output_file])
@pytest.mark.parametrize("below", ["out", "deep/out"])
def test_an_unwritable_parent_is_refused(kind, below, tmp_path):
    (tmp_path / "parent").write_text("a file")
    assert_refused(kind, tmp_path / "parent" / below, force=False)
    assert tree(tmp_path) == {"parent": "a file"}


@pytest.mark.parametrize("kind", [output_folder, output_file])
def test_a_name_too_long_for_the_file_system_is_refused(kind, tmp_path):
    assert_refused(kind, tmp_path / ("x" * 300), force=False)


def test_the_manifest_lists_every_file_with_its_hash(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    write_manifest(tmp_path, model_sha256="f" * 64, version="1.2.3", interface=INTERFACE)
    manifest = (tmp_path / "manifest.json").read_text()
    # SHA-256 of "abc", FIPS 180-2 appendix B.1.
    assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in manifest
    assert '"bytes": 3' in manifest
    assert "f" * 64 in manifest
    assert '"manifest.json"' not in manifest  # it cannot hold its own hash


def test_json_is_never_written_with_numbers_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "report.json", {"value": float("nan")})
    assert tree(tmp_path) == {}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"schema": 3, "files": []}',
        '{"schema": "asapc.manifest/1"}',
        '{"schema": "asapc.manifest/1", "files": 7}',
        '{"schema": "asapc.manifest/1", "files": [["a"]]}',
        "[" * 100_000,
        "7" * 100_000,
    ],
)
def test_a_folder_with_a_manifest_of_another_shape_is_kept(manifest, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(manifest)
    with pytest.raises(OutputError, match="was not written by asapc"), output_folder(out, force=True):
        pass
    assert (out / "manifest.json").read_text() == manifest


@pytest.mark.timeout(60)
def test_a_manifest_that_is_a_pipe_or_a_device_is_not_opened(tmp_path):
    for name, make in {"pipe": os.mkfifo, "device": lambda path: os.symlink("/dev/zero", path)}.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / "manifest.json")
        with pytest.raises(OutputError, match="was not written by asapc"), output_folder(tmp_path / name, force=True):
            pass
