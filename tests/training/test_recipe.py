"""Recipes: what they say, and what is said of those that cannot be."""

from pathlib import Path

import pytest
from helpers.training import TINY, TINY_FILE

from asapc.errors import OptionError
from asapc.training.recipe import Recipe, shipped
from asapc.training.tasks import TASKS

LEAST = 'task = "digits"\nsteps = 5\n'


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_for_each_task_is_carried():
    assert set(shipped()) == set(TASKS)
    for name in shipped():
        assert Recipe.read(name).task == name


def test_a_file_says_what_the_dataclass_does(tmp_path):
    assert Recipe.read(recipe_file(tmp_path, TINY_FILE)) == TINY
    assert Recipe.read(recipe_file(tmp_path, LEAST)) == Recipe("digits", 5)


def test_a_file_in_the_working_directory_does_not_hide_a_recipe_that_is_carried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(TINY_FILE)
    assert Recipe.read("digits").steps > TINY.steps


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("steps = 5", "lacks `task`", "task"),
        ('task = "digits"', "lacks `steps`", "steps"),
        ('task = "chess"\nsteps = 5', "no task 'chess'", "mails"),
        ("task = 3\nsteps = 5", "task cannot be 3", "a string"),
        ('task = "digits"\nsteps = -1', "steps cannot be -1", "from 1"),
        ('task = "digits"\nsteps = 2.5', "steps cannot be 2.5", "a whole number"),
        ('task = "digits"\nsteps = true', "steps cannot be True", "a whole number"),
        (f"{LEAST}steps_more = 3", "sets `steps_more`", "learning_rate"),
        (f"{LEAST}learning_rate = nan", "learning_rate cannot be nan", "above 0"),
        (f"{LEAST}learning_rate = 0", "learning_rate cannot be 0", "above 0"),
        (f'{LEAST}attention = "linear"', "attention cannot be 'linear'", "softmax"),
        (f"{LEAST}iterations = 0", "iterations cannot be 0", "from 1"),
        (f"{LEAST}seed = -1", "seed cannot be -1", "from 0"),
        (f"{LEAST}model = 3", "model cannot be 3", "a table"),
        (f"{LEAST}[model]\nwidth = -8", "width of [model] cannot be -8", "at least 0"),
        (f'{LEAST}[model]\nwidth = "wide"', "width of [model] cannot be 'wide'", "a number"),
        (f"{LEAST}[model]\nepsilon = 1.0", "`epsilon` stands in [model]", "above [model]"),
        ("steps = ", "cannot read", "TOML"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_the_file_and_the_reason(text, message, hint, tmp_path):
    path = recipe_file(tmp_path, text)
    with pytest.raises(OptionError) as caught:
        Recipe.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(("name", "message", "hint"), [("cifar", "'cifar'", "digits"), ("c.toml", "no such", "path")])
def test_a_recipe_that_there_is_none_of_is_refused(name, message, hint):
    with pytest.raises(OptionError, match=message) as caught:
        Recipe.read(name)
    assert hint in caught.value.hint
