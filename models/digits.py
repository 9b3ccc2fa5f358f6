"""Trains the Sinkhorn Vision Transformer on scikit-learn's digits, and its softmax twin for comparison."""

import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from asapc.models.vit import VisionTransformer

HELD_OUT = 500  # images that training never sees, the same for every seed
CALIBRATION = 64  # training images in the checkpoint
SPLIT_SEED = 0
BATCH = 64
LEARNING_RATE = 3e-3

VARIANTS = {"softmax": 0, "sinkhorn": 20}  # full Sinkhorn iterations

# Called after each epoch with the model's name, the number of epochs so far and the training loss of the last batch.
OnEpoch = Callable[[str, int, float], None]


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Load the images (1797, 8, 8) in [0, 1] and their labels (1797,)."""
    with np.load(Path(__file__).parent / "data" / "digits.npz") as file:
        return torch.from_numpy(file["images"]).float() / 16, torch.from_numpy(file["labels"]).long()


def augment(images: torch.Tensor) -> torch.Tensor:
    """Rotate by up to 9 degrees, scale by up to 7 % and shift by up to 0.6 pixels, each image on its own."""
    b = len(images)
    angle, shift = 0.15 * uniform(b, 1), 0.15 * uniform(b, 2)
    size = 1 + 0.07 * uniform(b, 1)
    cos, sin = size * angle.cos(), size * angle.sin()
    rows = torch.cat([cos, -sin, shift[:, :1], sin, cos, shift[:, 1:]], dim=1)
    grid = F.affine_grid(rows.view(b, 2, 3), [b, 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)


def uniform(*shape: int) -> torch.Tensor:
    """Return uniform random numbers in [-1, 1)."""
    return 2 * torch.rand(*shape) - 1


def fit(
    model: VisionTransformer,
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    on_epoch: Callable[[int, float], None],
) -> None:
    """Train with AdamW and a one-cycle learning rate; `on_epoch` is called after each epoch."""
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    model.train()
    for epoch in range(1, epochs + 1):
        for index in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(augment(images[index])), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        on_epoch(epoch, loss.item())
    model.eval()


def accuracy(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images that the model labels correctly."""
    with torch.no_grad():
        return (model(images).argmax(dim=-1) == labels).double().mean().item()


def train(seed: int, epochs: int, on_epoch: OnEpoch) -> dict[str, Any]:
    """Train the Sinkhorn model and its softmax twin with equal budgets; return the checkpoint of the first.

    The checkpoint holds only tensors, numbers and strings, so it loads with weights_only=True. It carries what a
    compiler needs to know about the model: the class and arguments that build it, some training images for calibration,
    and the held-out images with their labels.
    """
    images, labels = load_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    accuracies: dict[str, float] = {}
    for name, iterations in VARIANTS.items():
        torch.manual_seed(seed)
        args: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "epsilon": 0.25, "iterations": iterations}
        model = VisionTransformer(**args)
        fit(model, images[training], labels[training], epochs, partial(on_epoch, name))
        accuracies[name] = accuracy(model, images[held_out], labels[held_out])
    return {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.vit:VisionTransformer",
        "model_args": args,
        "state_dict": model.state_dict(),
        "calibration": {"inputs": {"images": images[training[:CALIBRATION]]}},
        "held_out": {"inputs": {"images": images[held_out]}, "labels": labels[held_out]},
        "training": {
            "data": "digits",
            "seed": seed,
            "epochs": epochs,
            "held_out_accuracy": accuracies["sinkhorn"],
            "softmax_twin_accuracy": accuracies["softmax"],
            "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
        },
    }


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint."""
    buffer = io.BytesIO()  # on a full disk torch.save raises errors that do not say so
    torch.save(checkpoint, buffer)
    path.write_bytes(buffer.getvalue())
