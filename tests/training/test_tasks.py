"""What is trained on: the data, what of it is held out, and the losses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from asapc.errors import OptionError
from asapc.loading.model import load_model
from asapc.training import corpora, tasks
from asapc.training.evaluate import evaluate
from asapc.training.shapes import JITTER, SHAPES, pairs, point_sets
from asapc.training.tasks import HELD_OUT, match_entropy, move_images, task
from asapc.types.samples import Samples


def use_files(monkeypatch, files: dict[str, str]) -> None:
    """Let packages have these files."""

    def read(package, pattern):
        return [(match, text) for name, text in sorted(files.items()) if (match := re.fullmatch(pattern, name))]

    monkeypatch.setattr(corpora, "read_files", read)


def rows(value: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in value}


def test_there_is_no_task_of_another_name():
    with pytest.raises(OptionError, match="chess") as caught:
        task("chess")
    assert "speeches" in caught.value.hint


def test_digits_are_all_ten_in_unit_range_and_some_held_out():
    digits = task("digits")
    images = torch.cat([part.inputs["images"] for part in (digits.training, digits.held_out)])
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    for part in (digits.training, digits.held_out):
        assert sorted(part.labels.unique().tolist()) == list(range(10))
    assert len(digits.held_out) == HELD_OUT
    assert not rows(digits.training.inputs["images"]) & rows(digits.held_out.inputs["images"])


def test_the_shipped_checkpoint_is_what_its_training_claims_and_holds_the_same_samples_out(shipped: Path):
    assert shipped.stat().st_size < 1_000_000
    claim = torch.load(shipped, weights_only=True)["training"]["held_out_accuracy"]
    assert claim >= 0.95
    # Ties aside, another machine computes the same classes; one image of 500 is allowed for.
    assert abs(evaluate(shipped).accuracy - claim) <= 1 / HELD_OUT + 1e-9
    loaded, digits = load_model(shipped), task("digits")
    assert torch.equal(loaded.held_out.inputs["images"], digits.held_out.inputs["images"])
    assert torch.equal(loaded.calibration.inputs["images"], digits.training.inputs["images"][:64])


def test_augmentation_keeps_shape_and_range_and_changes_the_images():
    batch = task("digits").training[:10]
    images, moved = batch.inputs["images"], move_images(batch).inputs["images"]
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1 + 1e-6
    assert not torch.equal(moved, images)


def test_point_sets_are_of_unit_size_and_of_all_shapes():
    points, labels = point_sets(200, seed=0, size=16)
    assert points.shape == (200, 16, 3)
    assert set(labels.tolist()) == set(range(len(SHAPES)))
    assert 0.9 < points.square().sum(dim=-1).mean() < 1.1


def test_matches_lead_to_the_same_point_of_the_turned_set():
    first, second, matches = pairs(4, seed=0, size=32)
    assert torch.equal(matches.sort(dim=-1).values, torch.arange(32).expand(4, -1))
    found = second.gather(1, matches.unsqueeze(-1).expand_as(second))
    assert not torch.allclose(found, first, atol=6 * JITTER)  # turned
    assert torch.allclose(torch.cdist(found, found), torch.cdist(first, first), atol=12 * JITTER)


def test_the_loss_of_matches_is_zero_for_the_true_plan_and_that_of_a_guess_for_an_even_one():
    matches = torch.tensor([[2, 0, 1], [0, 1, 2]])
    true = torch.nn.functional.one_hot(matches).float().requires_grad_()
    assert match_entropy(true, matches) == 0
    assert match_entropy(torch.full((2, 3, 3), 1 / 3), matches).item() == pytest.approx(math.log(3))
    match_entropy(true, matches.flip(1)).backward()
    assert true.grad.isfinite().all()


def test_mails_are_read_to_a_fixed_length_and_no_two_are_alike(monkeypatch):
    def mail(words):
        return json.dumps({"text": "Subject: no word of it\n\n" + " ".join(words)})

    long, other = [f"w{i}" for i in range(200)], [f"v{i}" for i in range(200)]
    files = {
        "package/data/spam-1/00001.a.json": mail(long),
        "package/data/spam-1/00002.b.json": mail(long),
        "package/data/easy-ham-1/00001.c.json": mail(other),
        "package/data/hard-ham-1/00001.d.json": mail(long[:100]),
        "package/data/spam-1/index.json": "no mail",
    }
    use_files(monkeypatch, files)
    tokens, labels = corpora.mails()
    assert tokens.shape == (2, corpora.WORDS)
    assert labels.tolist() == [0, 1]
    assert tokens.min() >= 0
    assert tokens.max() < corpora.VOCABULARY


def test_speeches_are_cut_into_passages_and_held_out_whole(monkeypatch):
    years = range(1792, 2016, 7)
    files = {f"package/data/{year}_a_president_d.txt": f"In {year} " * 700 for year in years}
    use_files(monkeypatch, files)
    tokens, eras, numbers = corpora.speeches()
    assert tokens.shape == (5 * len(years), corpora.PASSAGE)
    assert eras.unique().tolist() == [0, 1, 2, 3]
    assert [eras[numbers == number].unique().item() for number in (0, 8, 9)] == [0, 0, 1]  # 1792, 1848, 1855
    speeches = tasks.speeches()
    assert len(speeches.training) + len(speeches.held_out) == len(tokens)
    assert not rows(speeches.training.inputs["tokens"]) & rows(speeches.held_out.inputs["tokens"])
    assert speeches.sizes == {"vocabulary": corpora.VOCABULARY, "length": corpora.PASSAGE, "classes": 4}


def test_handwriting_loses_its_margin_and_is_halved_by_means_and_an_unfinished_image_left_out(monkeypatch):
    inside = [9.0] * 2 + [0.5, 1.0] * 12 + [9.0] * 2
    pixels = [9.0] * 56 + (inside + [9.0] * 2 + [0.0] * 24 + [9.0] * 2) * 12 + [9.0] * 56
    files = {f"package/src/digits/{digit}.json": json.dumps({"data": [*pixels, 1.0]}) for digit in range(10)}
    use_files(monkeypatch, files)
    images, labels = corpora.handwriting()
    assert torch.equal(images, torch.full((10, 12, 12), 0.375))
    assert labels.tolist() == list(range(10))


def test_a_task_without_augmentation_leaves_a_batch_as_it_is():
    batch = Samples({"points": torch.zeros(2, 4, 3)}, torch.zeros(2))
    assert task("pointset").augment(batch) is batch
