"""`asapc train` and `asapc eval`."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers.command import assert_user_error, run, written
from helpers.paths import ROOT
from helpers.training import TINY_FILE

from asapc.training.recipe import shipped


@pytest.fixture
def recipe() -> Path:
    return written(Path("tiny.toml"), TINY_FILE.encode())


def test_train_writes_a_checkpoint_that_is_not_overwritten(recipe):
    result = run("train", recipe, "--seed", 3, "--steps", 2, "--attention", "softmax", "--out", "mine.pt")
    assert result.exit_code == 0, result.output
    assert "mine.pt: held-out accuracy" in result.stdout
    assert [path.name for path in sorted(Path.cwd().iterdir())] == ["mine.pt", "tiny.toml"]
    facts = torch.load("mine.pt", weights_only=True)["training"]
    assert (facts["seed"], facts["steps"], facts["attention"]) == (3, 2, "softmax")

    before = Path("mine.pt").read_bytes()
    error, hint = assert_user_error(run("train", recipe, "--out", "mine.pt"))
    assert "exists" in error
    assert "--force" in hint
    assert Path("mine.pt").read_bytes() == before


@pytest.mark.slow
def test_the_digits_are_trained_by_the_recipe_that_is_carried():
    result = run("train", "digits", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "model.pt: held-out accuracy" in result.stdout


def test_help_names_the_recipes_that_are_carried():
    text = " ".join(run("train", "--help").stdout.split())
    assert all(name in text for name in shipped())


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("cifar",), "cifar", "digits"),
        (("digits", "--attention", "linear"), "linear", "softmax"),
        (("digits", "--seed", -1), "seed", "from 0"),
    ],
)
def test_train_refuses_what_cannot_be(arguments, error, hint):
    message, advice = assert_user_error(run("train", *arguments))
    assert error in message
    assert hint in advice
    assert list(Path.cwd().iterdir()) == []


def test_train_refuses_an_output_that_cannot_be_written_before_it_trains():
    written(Path("file"))
    assert_user_error(run("train", "digits", "--out", "file/model.pt"))
    assert [path.name for path in Path.cwd().iterdir()] == ["file"]


def test_eval_says_how_often_a_model_is_right(recipe):
    run("train", recipe)
    facts = torch.load("model.pt", weights_only=True)["training"]
    result = run("eval", "model.pt", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    jsonschema.validate(data, json.loads((ROOT / "docs" / "eval.schema.json").read_text()))
    assert data["metric"] == {"name": "accuracy", "value": facts["held_out_accuracy"]}
    assert f"accuracy {facts['held_out_accuracy']:.1%} on 500 held-out samples" in run("eval", "model.pt").stdout


def test_eval_refuses_what_is_neither_a_checkpoint_nor_a_compiled_folder():
    written(Path("model.pt"), b"none")
    Path("folder").mkdir()
    for name in ("missing.pt", "model.pt", "folder"):
        error, _ = assert_user_error(run("eval", name))
        assert name in error
