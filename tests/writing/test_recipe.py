"""The command in a report asks for the same again."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

from helpers.command import run

import asapc.commands.compile
from asapc.config import OPTIONS, CompileConfig
from asapc.writing.recipe import command_line, options_data

ODD = CompileConfig(
    out=Path("a folder/out"),
    force=True,
    calib="samples; rm.npz",
    fidelity=("relc<=0.05", "agreement>=0.9"),
    level=1,
    model="my.models:build",
    model_args={"name": "it's <b>", "depth": 2},
    input_shape=("x=2,3",),
    seconds=0.5,
    batches=(1, 8),
    relu_activations=1e-3,
)


def test_the_command_gives_the_options_that_it_was_written_from(monkeypatch):
    actual = []
    monkeypatch.setattr(asapc.commands.compile, "compile_model", lambda *args: actual.extend(args[:2]) or 1 / 0)
    program, *words = shlex.split(command_line(Path("my model.pt"), ODD))
    run(*words)
    assert program == "asapc"
    path, config = actual
    assert path == Path("my model.pt")
    for field in fields(CompileConfig):
        expected, value = getattr(ODD, field.name), getattr(config, field.name)
        same = json.loads(value) if field.name == "model_args" else value
        assert str(same) == str(expected), field.name


def test_defaults_are_not_written_and_stand_among_the_options():
    assert command_line(Path("model.pt"), CompileConfig()) == "asapc compile model.pt"
    data = options_data(CompileConfig(), Path("model.asap"), 3)
    assert data.keys() == {option.key for option in OPTIONS.values()}
    assert (data["out"], data["threads"], data["batch"], data["seconds"]) == ("model.asap", 3, [1, 32], 10.0)
    json.dumps(options_data(ODD, Path("out"), 1), allow_nan=False)
