"""Trains the Sinkhorn models that the studies of fits are about, and keeps them in benchmarks/cache/.

    python -m benchmarks.teachers                              # what is missing: about an hour on one core
    python -m benchmarks.teachers --seeds 0 --only 'pointset*'

Each is a checkpoint as `asapc train` writes it. Seeds decide weights and order, never the data, so that held-out
samples are the same for all. Training runs the loop in the scaling form; a checkpoint is of the model as written.
"""

import argparse
import importlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asapc.commands.study import study
from asapc.models import digits
from asapc.models.sinkhorn import FORMS
from asapc.types.teacher import Teacher
from benchmarks.teacher_data import VOCABULARY, WORDS, mails, point_sets

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / "cache"
SHIPPED = ROOT / "models" / "digits.pt"  # the digits teacher of seed 0

SEEDS = (0, 1, 2)
CALIBRATION, HELD_OUT = 64, 500  # samples
POINT_SETS = 5120  # for training
SPLIT_SEED = 0
BATCH = 16
ROUNDING = 1e-3  # by which logits of the scaling form may differ, relative


@dataclass(frozen=True)
class Recipe:
    """A model to train: what on, T in full iterations, epsilon, heads and their size."""

    data: str
    iterations: int
    epsilon: float
    epochs: int
    heads: int = 4
    head_size: int = 16
    learning_rate: float = 3e-3  # of which wide heads make scores so sharp that plans underflow

    def name(self, seed: int) -> str:
        """Return the name of its checkpoint."""
        head = "" if self.head_size == 16 else f"_head{self.head_size}"
        return f"{self.data}_T{self.iterations}_eps{self.epsilon:g}{head}_seed{seed}"


TEACHERS = (
    Recipe("pointset", 20, 0.25, epochs=2),
    Recipe("pointset", 20, 0.1, epochs=2),
    Recipe("text", 5, 1.0, epochs=3),
    Recipe("pointset", 5, 0.25, epochs=2),
    Recipe("pointset", 3, 0.25, epochs=2),
    Recipe("pointset", 10, 0.25, epochs=3, heads=2, head_size=64, learning_rate=1e-3),
    Recipe("text", 25, 0.25, epochs=3),
    Recipe("digits", 20, 0.25, epochs=20),
)
MODELS = {
    "pointset": ("asapc.models.pointset:PointTransformer", "points"),
    "text": ("asapc.models.text:TextTransformer", "tokens"),
}


def main() -> None:
    """Train what is asked for and not there yet, and print a table of all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of checkpoints, as in a shell")
    parser.add_argument("--device", default="cpu", help="where to train, cuda for a GPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sharp plans are full of them
    CACHE.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for teacher in TEACHERS:
            name = teacher.name(seed)
            path = CACHE / f"{name}.pt"
            if path.exists() or not fnmatch(name, options.only):
                continue
            if teacher.data == "digits" and seed == 0:
                shutil.copy(SHIPPED, path)
                continue
            start = time.perf_counter()
            checkpoint = (
                train_digits(teacher, seed) if teacher.data == "digits" else train(teacher, seed, options.device)
            )
            checkpoint["training"]["seconds"] = round(time.perf_counter() - start, 1)
            partial = path.with_suffix(".partial")
            torch.save(checkpoint, partial)
            partial.rename(path)
            print(row(name, checkpoint["training"]), flush=True)
    print(f"\n{'teacher':36}{'epochs':>8}{'accuracy':>10}{'seconds':>9}")
    for name, path in cached():
        print(row(name, torch.load(path, weights_only=True)["training"]))


def row(name: str, facts: dict[str, Any]) -> str:
    """Return a line of the table."""
    return f"{name:36}{facts['epochs']:>8}{facts['held_out_accuracy']:>10.3f}{facts.get('seconds', '-'):>9}"


def cached() -> Iterator[tuple[str, Path]]:
    """Yield names and files of the checkpoints that are there."""
    for teacher in TEACHERS:
        for seed in SEEDS:
            path = CACHE / f"{teacher.name(seed)}.pt"
            if path.exists():
                yield path.stem, path


def studied(pattern: str) -> Iterator[tuple[str, Teacher]]:
    """Yield the checkpoints that are there, of names that match as in a shell."""
    for name, path in cached():
        if fnmatch(name, pattern):
            yield name, study(path)


@cache
def load(data: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the samples with their labels: those to train on, and the held-out ones."""
    if data == "pointset":
        return point_sets(POINT_SETS, SPLIT_SEED + 1), point_sets(HELD_OUT, SPLIT_SEED)
    tokens, labels = mails(CACHE)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return (tokens[training], labels[training]), (tokens[held_out], labels[held_out])


def train(teacher: Recipe, seed: int, device: str) -> dict[str, Any]:
    """Train one teacher on a device; return its checkpoint."""
    (samples, labels), (held_out, answers) = load(teacher.data)
    name, argument = MODELS[teacher.data]
    args: dict[str, Any] = {
        "width": teacher.heads * teacher.head_size,
        "depth": 2,
        "heads": teacher.heads,
        "epsilon": teacher.epsilon,
        "iterations": teacher.iterations,
    }
    if teacher.data == "text":
        args |= {"vocabulary": VOCABULARY, "length": WORDS}
    torch.manual_seed(seed)
    module, _, class_name = name.partition(":")
    model = getattr(importlib.import_module(module), class_name)(**args).to(device)
    with patch.dict(FORMS, log=FORMS["scaling"]):
        fit(model, samples.to(device), labels.to(device), teacher)
        model.cpu()
        logits = run(model, held_out)
    require_same(logits[:BATCH], run(model, held_out[:BATCH]))
    return {
        "format": "asapc.checkpoint/1",
        "model": name,
        "model_args": args,
        "state_dict": model.state_dict(),
        "calibration": {"inputs": {argument: samples[:CALIBRATION].clone()}},
        "held_out": {"inputs": {argument: held_out.clone()}, "labels": answers.clone()},
        "training": {
            "data": teacher.data,
            "seed": seed,
            "epochs": teacher.epochs,
            "held_out_accuracy": (logits.argmax(dim=-1) == answers).double().mean().item(),
            "torch": str(torch.__version__),
        },
    }


def train_digits(teacher: Recipe, seed: int) -> dict[str, Any]:
    """Train the digits teacher by its own recipe."""
    with patch.dict(FORMS, log=FORMS["scaling"]):
        return digits.train(seed, teacher.epochs, lambda name, epoch, loss: None)


def fit(model: nn.Module, samples: Tensor, labels: Tensor, teacher: Recipe) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    rate = teacher.learning_rate
    steps = teacher.epochs * math.ceil(len(samples) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    model.train()
    for epoch in range(1, teacher.epochs + 1):
        for index in torch.randperm(len(samples)).split(BATCH):
            loss = F.cross_entropy(model(samples[index]), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch}: loss {loss.item():.3f}", flush=True)
    model.eval()


def run(model: nn.Module, samples: Tensor) -> Tensor:
    """Return the logits of samples."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in samples.split(BATCH)])


def require_same(trained: Tensor, written: Tensor) -> None:
    """Raise where the model that was trained is not the model as written."""
    difference = ((trained - written).norm() / written.norm()).item()
    if not difference <= ROUNDING:
        raise SystemExit(f"the scaling form and the loop as written differ by {difference:.1e}")


if __name__ == "__main__":
    main()
