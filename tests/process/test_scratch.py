"""Temporary folders go with their process, or with the next run after a kill."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from asapc.process.scratch import LOCK, scratch_folder, sweep, temporary_files

PREFIX = ".asapc."


def killed(parent: Path) -> Path:
    """The folder of a process that was killed as it worked, with a file in it."""
    code = """
import os, signal, sys
from pathlib import Path
from asapc.process.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "new").mkdir()
    (folder / "new" / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(parent), PREFIX], check=False)
    (folder,) = parent.glob(f"{PREFIX}*")
    assert (folder / "new" / "half").exists()
    return folder


def test_a_folder_goes_at_the_end_and_on_an_error(tmp_path):
    with scratch_folder(tmp_path, PREFIX) as folder:
        (folder / "file").write_text("x")
    with pytest.raises(RuntimeError), scratch_folder(tmp_path, PREFIX):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_removes_the_folder_of_a_killed_process(tmp_path):
    stale = killed(tmp_path)
    with scratch_folder(tmp_path, PREFIX):
        assert not stale.exists()


def test_a_folder_whose_process_lives_is_left_alone(tmp_path):
    with scratch_folder(tmp_path, PREFIX) as folder:
        sweep(tmp_path, PREFIX)
        assert (folder / LOCK).exists()


def test_what_only_looks_like_such_a_folder_is_left_alone(tmp_path):
    own = tmp_path / f"{PREFIX}settings"  # eight letters, as tempfile takes
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    long = tmp_path / f"{PREFIX}long-names"
    long.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (tmp_path / f"{PREFIX}abcdefgh").symlink_to(elsewhere)
    sweep(tmp_path, PREFIX)
    assert (own / "thesis.txt").exists()
    assert long.exists()
    assert (elsewhere / LOCK).exists()


def test_a_folder_of_a_process_killed_before_it_had_a_lock_is_removed(tmp_path):
    (tmp_path / f"{PREFIX}abcdefgh").mkdir()
    sweep(tmp_path, PREFIX)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_swept_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    make, folders = tempfile.mkdtemp, []

    def make_and_sweep(**arguments):
        folders.append(make(**arguments))
        if len(folders) == 1:
            sweep(tmp_path, PREFIX)
        return folders[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    with scratch_folder(tmp_path, PREFIX) as folder:
        assert (folder / LOCK).exists()
    assert len(folders) == 2
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_libraries_go_with_the_block(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with temporary_files():
        (Path(tempfile.gettempdir()) / "torchinductor_root").mkdir()
        assert Path(os.environ["TMPDIR"]).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path)
