"""`asapc train`."""

from pathlib import Path

import pytest
import torch
from helpers.command import assert_user_error, run, written

from asapc.loading.model import load_model


def test_train_refuses_a_recipe_that_there_is_none_of():
    error, hint = assert_user_error(run("train", "cifar"))
    assert "cifar" in error
    assert "digits" in hint


@pytest.mark.slow
def test_train_writes_a_checkpoint_that_loads_and_is_not_overwritten(tmp_path):
    result = run("train", "digits", "--epochs", 1, "--seed", 3, "--out", "model.pt")
    assert result.exit_code == 0, result.output
    assert "model.pt: held-out accuracy" in result.stdout
    assert "softmax twin" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

    loaded = load_model(Path("model.pt"))
    assert len(loaded.calibration) == 64
    assert len(loaded.held_out) == 500
    facts = torch.load("model.pt", weights_only=True)["training"]
    assert (facts["seed"], facts["epochs"]) == (3, 1)
    with torch.no_grad():
        right = loaded.module(loaded.held_out.inputs["images"]).argmax(dim=-1) == loaded.held_out.labels
    assert facts["held_out_accuracy"] == pytest.approx(right.double().mean().item(), abs=0.002)

    before = Path("model.pt").read_bytes()
    error, hint = assert_user_error(run("train", "digits", "--epochs", 1, "--out", "model.pt"))
    assert "exists" in error
    assert "--force" in hint
    assert Path("model.pt").read_bytes() == before


def test_train_refuses_an_output_that_cannot_be_written_before_it_trains():
    written(Path("file"))
    assert_user_error(run("train", "digits", "--out", "file/model.pt"))
    assert [path.name for path in Path.cwd().iterdir()] == ["file"]
