"""Hostile files: refused in one line before they run anything or take memory, whatever reads them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.hostile import BOMB_FORMATS, Bomb, assert_refused

from asapc.config import CompileConfig
from asapc.errors import AsapcError, CheckpointError
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples


def read_inputs(path: Path) -> object:
    """The file as example inputs of a model whose own file is never reached."""
    return load_model(path, CompileConfig(inputs=path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".pt2", ".onnx", ".npz", ""])
@pytest.mark.parametrize("name", BOMB_FORMATS)
@pytest.mark.parametrize("read", [load_model, load_samples, read_inputs])
def test_no_reader_runs_a_pickle_under_any_suffix(read, name, suffix, tmp_path):
    path, marker = tmp_path / f"file{suffix}", tmp_path / "marker"
    BOMB_FORMATS[name](path, {"x": Bomb(marker), "weight": torch.zeros(2)})
    assert_refused(AsapcError, read, path)
    assert not marker.exists()


@pytest.mark.parametrize("read", [load_model, load_samples, read_inputs])
def test_an_array_of_objects_is_not_unpickled(read, tmp_path):
    path, marker = tmp_path / "file.npz", tmp_path / "marker"
    np.savez(path, x=np.array([Bomb(marker)], dtype=object))
    assert_refused(AsapcError, read, path, named="file.npz")
    assert not marker.exists()


@pytest.mark.parametrize("read", [load_model, load_samples])
def test_one_array_in_a_file_of_numpy_is_not_unpickled(read, tmp_path):
    path, marker = tmp_path / "file.npy", tmp_path / "marker"
    np.save(path, np.array([Bomb(marker)], dtype=object))
    assert_refused(AsapcError, read, path)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pt2", ".npz"])
@pytest.mark.parametrize("read", [load_model, load_samples])
def test_pipes_devices_and_folders_are_not_read(read, suffix, tmp_path):
    pipe, folder, zero = (tmp_path / f"{name}{suffix}" for name in ("pipe", "folder", "zero"))
    os.mkfifo(pipe)
    folder.mkdir()
    zero.symlink_to("/dev/zero")
    for path in (pipe, folder, zero):
        assert_refused(AsapcError, read, path)


def test_a_link_to_a_file_is_followed(shipped, tmp_path):
    (tmp_path / "link.pt").symlink_to(shipped)
    assert load_model(tmp_path / "link.pt").parameters == load_model(shipped).parameters


def test_names_from_a_file_cannot_break_the_line_or_steer_the_terminal(tmp_path):
    path = tmp_path / "line\nbreak.pt"
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert str(caught.value).isprintable()
