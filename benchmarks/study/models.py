"""The trained models of the study: by task, attention and seed, trained by the recipes of `asapc train`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from asapc.training.loop import train
from asapc.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = ("digits", "mnist", "pointset", "pointset-inducing", "mails", "speeches", "matching")
SEEDS = (0, 1, 2)
ATTENTIONS = ("sinkhorn", "softmax")  # sliced transport takes many times as long: see the part on the cost of training
QUICK_STEPS = 12


def seeds(quick: bool) -> tuple[int, ...]:
    """Return the seeds of the study."""
    return SEEDS[:1] if quick else SEEDS


def folder_of(quick: bool) -> Path:
    """Return where the models are kept."""
    return ROOT / "benchmarks" / "cache" / ("study-quick" if quick else "study")


def path_of(task: str, attention: str, seed: int, quick: bool) -> Path:
    """Return where a model is kept."""
    return folder_of(quick) / f"{task}_{attention}_seed{seed}.pt"


def facts(task: str, attention: str, seed: int, quick: bool) -> dict[str, Any]:
    """Return the facts of a model's training; it is trained where it is missing, and goes on where it was stopped."""
    path = path_of(task, attention, seed, quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = replace(Recipe.read(task), attention=attention, seed=seed)
    of_training = train(replace(recipe, steps=QUICK_STEPS) if quick else recipe, path, resume=True)
    torch.set_flush_denormal(True)  # which training switches on for itself, and then off
    return of_training


def trained(task: str, attention: str, seed: int, quick: bool) -> Path:
    """Return the checkpoint of a model, see `facts`."""
    facts(task, attention, seed, quick)
    return path_of(task, attention, seed, quick)


def trainings(quick: bool) -> dict[tuple[str, str], Callable[[], dict[str, Any]]]:
    """Return what trains each model that is missing, by "training" and its name."""
    return {
        ("training", path_of(task, attention, seed, quick).stem): partial(facts, task, attention, seed, quick)
        for seed, task, attention in product(seeds(quick), TASKS, ATTENTIONS)
        if not path_of(task, attention, seed, quick).exists()
    }
