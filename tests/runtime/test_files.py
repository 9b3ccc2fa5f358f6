"""`asapc run`: a compiled model on the arrays of a file."""

import io
import pickle

import numpy as np
import pytest
from helpers.command import assert_user_error, run

from asapc.errors import SamplesError
from asapc.runtime.files import read_arrays, run_files, write_arrays
from asapc.runtime.model import load


@pytest.fixture(scope="module")
def folder(point_model):
    _, compile_it = point_model
    return compile_it(target="onnx").folder


def test_a_file_in_gives_a_file_out(folder, tmp_path):
    result = run("run", str(folder), "--inputs", str(folder / "samples.npz"), "--out", str(tmp_path / "y.npz"))
    assert result.exit_code == 0, result.output
    expected, outputs = np.load(folder / "expected.npz"), np.load(tmp_path / "y.npz")
    assert outputs.files == expected.files
    np.testing.assert_array_equal(outputs[outputs.files[0]], expected[expected.files[0]])


def test_an_array_alone_is_the_only_input(folder, tmp_path):
    points = np.load(folder / "samples.npz")["points"]
    np.save(tmp_path / "points.npy", points)
    note = run_files(folder, tmp_path / "points.npy", tmp_path / "y.npz", "cpu")
    assert "(4, 10)" in note
    assert note.endswith("on cpu")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npz", None, "no such file"),
        ("text.npz", b"PK no archive", "cannot read"),
        ("inputs.pt", b"content", "no .npz file"),
        ("objects.npy", pickle.dumps([1, 2]), "cannot read"),
    ],
)
def test_what_holds_no_arrays_is_refused(name, content, message, folder, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run("run", str(folder), "--inputs", str(tmp_path / name), "--out", str(tmp_path / "y.npz"))
    assert message in assert_user_error(result)[0]
    assert not (tmp_path / "y.npz").exists()


def test_objects_of_python_are_not_unpickled(folder, tmp_path):
    np.savez(tmp_path / "objects.npz", points=np.array([print, len], dtype=object))
    with pytest.raises(SamplesError):
        read_arrays(tmp_path / "objects.npz", load(folder))


def test_arrays_are_written_alike_every_time_whatever_their_names(tmp_path):
    arrays = {"file": np.arange(3), "a/b": np.ones((2, 2), np.float32)}
    for name in ("one.npz", "two.npz"):
        write_arrays(tmp_path / name, arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    content = np.load(io.BytesIO((tmp_path / "one.npz").read_bytes()))
    assert {name: content[name].tolist() for name in content.files} == {k: v.tolist() for k, v in arrays.items()}
