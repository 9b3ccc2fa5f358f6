"""The trained models of the study: by task, attention and seed, trained by the recipes of `asapc train`."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

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


def trained(task: str, attention: str, seed: int, quick: bool) -> Path:
    """Return the checkpoint of a model; it is trained where it is missing, and goes on where it was stopped."""
    path = path_of(task, attention, seed, quick)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = replace(Recipe.read(task), attention=attention, seed=seed)
        train(replace(recipe, steps=QUICK_STEPS) if quick else recipe, path, resume=True)
    return path


def train_missing(quick: bool, processes: int) -> None:
    """Train all models that are missing, several at once on a thread each."""
    context = get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(trained, *of_model, quick) for of_model in missing(quick)]
        for number, job in enumerate(jobs, 1):
            print(f"trained {job.result().name}, {number} of {len(jobs)}", flush=True)


def missing(quick: bool) -> Iterator[tuple[str, str, int]]:
    """Yield task, attention and seed of the models that are missing."""
    for seed in seeds(quick):
        for task in TASKS:
            for attention in ATTENTIONS:
                if not path_of(task, attention, seed, quick).exists():
                    yield task, attention, seed
