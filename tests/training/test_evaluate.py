"""The accuracy of checkpoints and of what was compiled from them, on the same samples."""

from pathlib import Path

import pytest
import torch
from helpers.command import write_checkpoint
from helpers.paths import ROOT
from helpers.training import TINY

from asapc.errors import CheckpointError, OptionError
from asapc.training.evaluate import evaluate, held_out, score, stored
from asapc.training.loop import train
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples


class Matching:
    """A runner that returns a plan for the matches that it is given, wrong in its first sample."""

    runtime = "none"

    def __call__(self, samples: Samples) -> list[torch.Tensor]:
        return [torch.nn.functional.one_hot(samples.inputs["right"]).float()]


def test_a_checkpoint_is_as_accurate_as_its_training_said(tmp_path):
    facts = train(TINY, tmp_path / "model.pt")
    result = evaluate(tmp_path / "model.pt")
    assert (result.runtime, result.samples) == ("torch", 500)
    assert result.accuracy == facts["held_out_accuracy"]


def test_a_compiled_folder_is_evaluated_on_the_samples_of_its_checkpoint(readme_folder, shipped, monkeypatch):
    monkeypatch.chdir(readme_folder)
    compiled, facts = evaluate(Path("digits.asap")), torch.load(shipped, weights_only=True)["training"]
    assert (compiled.runtime, compiled.samples) == ("onnxruntime", 500)
    assert compiled.accuracy >= 0.99 * facts["held_out_accuracy"]


def test_a_folder_is_not_evaluated_on_the_samples_of_another_model(readme_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"not at models/digits\.pt"):
        evaluate(readme_folder / "digits.asap")
    with pytest.raises(CheckpointError, match="is not the model"):
        evaluate(readme_folder / "digits.asap", write_checkpoint(tmp_path / "other.pt"))


def test_a_checkpoint_has_no_teacher(shipped):
    with pytest.raises(OptionError, match="has no teacher"):
        evaluate(shipped, shipped)


def test_a_model_without_labels_is_refused():
    with pytest.raises(CheckpointError, match="no held-out samples with labels") as caught:
        evaluate(ROOT / "models" / "language.pt")
    assert "asapc verify" in caught.value.hint


def test_outputs_that_are_no_numbers_are_not_scored():
    class Broken:
        runtime = "none"

        def __call__(self, samples):
            return [torch.full((len(samples), 3), torch.nan)]

    with pytest.raises(CheckpointError, match="not finite") as caught:
        score(Broken(), Samples({"x": torch.zeros(4, 1)}, torch.zeros(4, dtype=torch.long)))
    assert "learning_rate" in caught.value.hint


def test_a_checkpoint_of_another_tool_is_refused_with_what_this_command_takes(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError) as caught:
        evaluate(tmp_path / "other.pt")
    assert "asapc train" in caught.value.hint
    assert "--model" not in caught.value.hint


def test_no_held_out_samples_are_none(shipped):
    nothing = Samples({"images": torch.zeros(0, 8, 8)}, torch.zeros(0, dtype=torch.long))
    loaded = LoadedModel(torch.nn.Identity(), shipped, "", 0, None, nothing)
    with pytest.raises(CheckpointError, match="no held-out samples"):
        held_out(loaded)


def test_matches_are_stored_beside_the_samples_and_scored_point_by_point(tmp_path):
    matches = torch.tensor([[1, 0, 2], [2, 1, 0]])
    samples = Samples({"right": matches.index_fill(0, torch.tensor([0]), 0)}, matches)
    torch.save({"held_out": stored(samples)}, tmp_path / "model.pt")
    as_loaded = Samples(samples.inputs)
    loaded = LoadedModel(torch.nn.Identity(), tmp_path / "model.pt", "", 0, None, as_loaded)
    assert torch.equal(held_out(loaded).labels, matches)
    assert score(Matching(), held_out(loaded)) == pytest.approx(4 / 6)


def test_labels_that_do_not_fit_the_outputs_are_refused():
    samples = Samples({"right": torch.tensor([[1, 0]])}, torch.tensor([1]))
    with pytest.raises(CheckpointError, match="labels"):
        score(Matching(), samples)
