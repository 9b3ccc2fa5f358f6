from pathlib import Path

import torch

from asapc.loading.model import load_model
from asapc.models import digits


def test_the_data_is_the_digits_in_unit_range() -> None:
    images, labels = digits.load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert sorted(labels.unique().tolist()) == list(range(10))


def test_augmentation_keeps_shape_and_range_and_changes_the_images() -> None:
    images, _ = digits.load_digits()
    augmented = digits.augment(images[:10])
    assert augmented.shape == (10, 8, 8)
    assert augmented.min() >= 0
    assert augmented.max() <= 1 + 1e-6
    assert not torch.equal(augmented, images[:10])


def test_the_shipped_checkpoint_is_what_its_training_claims(shipped: Path) -> None:
    assert shipped.stat().st_size < 1_000_000
    facts = torch.load(shipped, weights_only=True)["training"]
    loaded = load_model(shipped)
    assert loaded.held_out is not None
    assert loaded.calibration is not None
    assert facts["held_out_accuracy"] >= 0.95
    # Ties aside, another machine computes the same classes; one image of 500 is allowed for.
    measured = digits.accuracy(loaded.module, loaded.held_out.inputs["images"], loaded.held_out.labels)
    assert abs(measured - facts["held_out_accuracy"]) <= 1 / digits.HELD_OUT + 1e-9
    assert len(loaded.calibration) == digits.CALIBRATION


def test_held_out_images_are_neither_trained_nor_calibrated_on(shipped: Path) -> None:
    loaded = load_model(shipped)
    held_out = {image.numpy().tobytes() for image in loaded.held_out.inputs["images"]}
    assert not any(image.numpy().tobytes() in held_out for image in loaded.calibration.inputs["images"])
