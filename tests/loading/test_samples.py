"""Samples of files, and example inputs: shapes as the user writes them, and what is drawn for them."""

import numpy as np
import pytest
import torch
from helpers.hostile import assert_refused

from asapc.config import CompileConfig
from asapc.errors import OptionError, SamplesError
from asapc.loading.model import load_model
from asapc.loading.samples import UNNAMED, draw_inputs, load_samples, parse_shape


def test_a_shape_is_read_as_written():
    assert parse_shape("x=2,197,64") == ("x", (2, 197, 64), torch.float32, 0, 1)
    assert parse_shape("x=2:float16")[1:3] == ((2,), torch.float16)
    assert parse_shape("mask=2,5:bool").dtype == torch.bool
    assert parse_shape("ids=2,128:int64:0..30000")[2:] == (torch.int64, 0, 30000)
    assert parse_shape("t=2:int8:-3..3")[3:] == (-3, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x=",
        "=2,3",
        "x=2,",
        "x=2,-3",
        "x=a",
        "x=2;3",
        "x=0,3",
        "x=2,0",
        "x=2:float31",
        "x=2:complex64",
        "x=2:",
        "x=2:float32:0..3",
        "x=2:bool:0..1",
        "x=2:int64:3..0",
        "x=2:int64:0...3",
        "x=2:int8:0..300",
        "x=2:uint8:-1..3",
        "x=999999999,999999999",
        "x=99999999999999999999",
        "x=2,3\n",
    ],
)
def test_a_shape_that_cannot_be_read_is_refused(text):
    assert_refused(OptionError, parse_shape, text, named="")


def test_inputs_are_drawn_by_their_dtype_and_the_seed():
    shapes = ("x=2,50", "h=2,50:float16", "ids=2,500:int64:3..5", "few=2,500:int32", "mask=2,500:bool")
    drawn = draw_inputs(shapes, seed=1).inputs
    assert drawn["x"].std() == pytest.approx(1, abs=0.5)
    assert drawn["h"].dtype == torch.float16
    assert set(drawn["ids"].unique().tolist()) == {3, 4, 5}
    assert set(drawn["few"].unique().tolist()) == {0, 1}
    assert drawn["mask"].float().mean() > 0.8
    again, other = draw_inputs(shapes, seed=1).inputs, draw_inputs(shapes, seed=2).inputs
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(drawn["x"], other["x"])


def test_a_batch_of_one_becomes_two():
    assert draw_inputs(("x=1,3", "y=1:int64"), 0).inputs["y"].shape == (2,)


@pytest.mark.parametrize("shapes", [("x=2,3", "x=2,4"), ("x=2,3", "y=3,3")])
def test_shapes_that_contradict_each_other_are_refused(shapes):
    assert_refused(OptionError, lambda shapes: draw_inputs(shapes, 0), shapes, named="")


def test_inputs_and_shapes_together_are_refused(shipped):
    config = CompileConfig(inputs="a.npz", input_shape=("x=2",))
    assert_refused(OptionError, lambda path: load_model(path, config), shipped, named="both")


VALUES = torch.arange(12.0).reshape(4, 3)
ALONE = {
    "array.npy": lambda path: np.save(path, VALUES.numpy()),
    "tensor.pt": lambda path: torch.save(VALUES, path),
    "list.pt": lambda path: torch.save(list(VALUES), path),
    "tuple.pth": lambda path: torch.save(tuple(VALUES), path),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_array_needs_no_name(name, tmp_path):
    ALONE[name](tmp_path / name)
    samples = load_samples(tmp_path / name)
    assert list(samples.inputs) == [UNNAMED]
    assert torch.equal(samples.inputs[UNNAMED], VALUES)


UNREADABLE = {
    "objects.npy": lambda path: np.save(path, np.array([{}, []], dtype=object), allow_pickle=True),
    "text.npy": lambda path: path.write_text("no array"),
    "short.npy": lambda path: path.write_bytes(npy_bytes(path)[:-8]),
    "long.npy": lambda path: path.write_bytes(npy_bytes(path) + b"more"),
    "uneven.pt": lambda path: torch.save([torch.ones(2), torch.ones(3)], path),
    "mixed.pt": lambda path: torch.save([torch.ones(2), 3], path),
    "empty.pt": lambda path: torch.save([], path),
    "number.npy": lambda path: np.save(path, 3.0),
}


def npy_bytes(path):
    np.save(path, VALUES.numpy())
    return path.read_bytes()


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_array_of_samples_is_refused(name, tmp_path):
    UNREADABLE[name](tmp_path / name)
    assert_refused(SamplesError, load_samples, tmp_path / name, named=name)
