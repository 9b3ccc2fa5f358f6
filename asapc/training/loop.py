"""`asapc train`: from a recipe to a checkpoint, and from where a killed run stopped."""

import io
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from asapc.backends.eager.runner import EagerRunner
from asapc.errors import CheckpointError, OptionError, OutputError
from asapc.events import OnEvent, Stage, stage
from asapc.loading.checkpoint import FORMAT
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_torch
from asapc.planning.distributed import processes_sharing, rank
from asapc.process import interrupts
from asapc.training.evaluate import score, stored
from asapc.training.recipe import Recipe
from asapc.training.run import Run, build, model_arguments
from asapc.training.tasks import task
from asapc.writing.folder import output_file

STATE = "asapc.training/1"
START_AGAIN = "start again with --force and without --resume"
CALIBRATION = 64  # training samples in the checkpoint
EVERY = 20  # steps from one state to the next, and over which the loss that is shown is a mean


def train(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    on_event: OnEvent = lambda event: None,
    force: bool = False,
) -> dict[str, Any]:
    """Train a model and write its checkpoint, the same bytes for the same recipe on the same machine.

    A state beside the checkpoint is replaced every few steps and removed at the end. In the processes of torchrun each
    takes a share of every batch; the first one writes.

    Args:
        recipe: what to train.
        out: the checkpoint to write.
        resume: whether to go on from a state; where there is none, the run begins anew, unless its checkpoint is there.
        on_event: called with progress.
        force: whether to replace a checkpoint that exists, and unless `resume` is given a state.

    Returns:
        The facts of the training, as they stand in the checkpoint.

    Raises:
        OptionError: the recipe does not fit its task, the state is of another recipe, or the loss is not finite.
        OutputError: `out` exists, cannot be written, or there is a state and neither `resume` nor `force` is given.
        CheckpointError: the state cannot be read, or outputs are not finite in the end.
        DependencyError: the data of the task cannot be fetched.
    """
    if not out.name:
        raise OutputError("the checkpoint has no name", "give a file")
    done = finished(out, recipe) if resume and not force else None
    if done is not None:
        return done
    first, state_file = rank() == 0, out.with_name(f"{out.name}.state")
    with output_file(out, force) if first else nullcontext(out) as partial, reproducible():
        state = read_state(state_file, recipe, resume, force)
        with stage("data", on_event) as step:
            data = task(recipe.task)
            step.summary = f"{len(data.training)} samples to train on, {len(data.held_out)} held out"
        run = Run(recipe, data)
        if state is not None:
            restore(run, state, state_file)

        def save_state() -> None:
            if first:
                write_state(run, partial.with_name(state_file.name), state_file)

        with stage("train", on_event) as step:
            advance(run, step, save_state)
        with stage("evaluate", on_event) as step:
            checkpoint = to_checkpoint(run)
            facts: dict[str, Any] = checkpoint["training"]
            step.summary = f"held-out accuracy {facts['held_out_accuracy']:.1%}"
        if first:
            save(checkpoint, partial)
    if first:
        remove_state(state_file)
    return facts


def finished(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the facts of a training that is done, by its checkpoint; None where there is none of this recipe."""
    try:
        content = read_torch(Source.at(out, CheckpointError))
    except CheckpointError:
        return None
    facts = content.get("training") if isinstance(content, dict) else None
    ours = header(recipe)["recipe"]
    same = isinstance(facts, dict) and {key: facts.get(key) for key in ours} == ours
    return facts if same else None


def advance(run: Run, step: Stage, save_state: Callable[[], None]) -> None:
    """Take all steps that are left, and report each.

    Raises:
        OptionError: the loss is not finite.
    """
    recent: deque[tuple[float, float]] = deque(maxlen=EVERY)
    start, begin, steps = time.perf_counter(), run.step, run.recipe.steps
    while run.step < steps:
        recent.append(run.advance())
        loss, right = (fmean(values) for values in zip(*recent, strict=True))
        if not math.isfinite(loss):
            raise OptionError(
                f"the loss is {loss} at step {run.step}", "give a smaller learning_rate, or a larger epsilon"
            )
        if run.step % EVERY == 0 or run.step == steps:
            save_state()
        step.summary = f"step {run.step}/{steps}, loss {loss:.3f}, accuracy {right:.1%}"
        left = (steps - run.step) * (time.perf_counter() - start) / (run.step - begin)
        step.advance(step.summary, left)


def to_checkpoint(run: Run) -> dict[str, Any]:
    """Return the checkpoint of a model that is trained, as it is written, which `asapc.loading` reads.

    It holds tensors, numbers and strings alone, and what a compiler needs to know of the model: the class and arguments
    that build it, some training samples for calibration, and the held-out ones with their labels.
    """
    recipe, data = run.recipe, run.task
    arguments = model_arguments(recipe, data)
    model = build(data.model, arguments).eval()
    model.load_state_dict(run.model.state_dict())
    calibration = data.training[list(range(min(CALIBRATION, len(data.training))))]
    return {
        "format": FORMAT,
        "model": data.model,
        "model_args": arguments,
        "state_dict": model.state_dict(),
        "calibration": {"inputs": dict(calibration.inputs)},
        "held_out": stored(data.held_out),
        "training": {**header(recipe)["recipe"], "held_out_accuracy": score(EagerRunner(model), data.held_out)},
    }


def header(recipe: Recipe) -> dict[str, Any]:
    """Return what tells the state of one recipe from that of another."""
    # A subclass of str, which no reader of plain tensors takes.
    facts = {**asdict(recipe), "torch": str(torch.__version__), "processes": processes_sharing()}
    return {"format": STATE, "recipe": facts}


def write_state(run: Run, partial: Path, path: Path) -> None:
    """Replace the state of a run by way of another file, so that it is whole at any moment."""
    save({**header(run.recipe), **run.state()}, partial)
    partial.replace(path)
    if str(path) not in interrupts.state.outputs:
        interrupts.state.outputs.append(str(path))


def remove_state(path: Path) -> None:
    """Remove the state of a run that is done."""
    path.unlink(missing_ok=True)
    if str(path) in interrupts.state.outputs:
        interrupts.state.outputs.remove(str(path))


def read_state(path: Path, recipe: Recipe, resume: bool, force: bool) -> dict[str, Any] | None:
    """Return the state to go on from, None where there is none.

    Raises:
        OutputError: there is a state, and neither `resume` nor `force` is given.
        OptionError: it is of another recipe.
        CheckpointError: it cannot be read.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder, and the state of a training is written there", "remove it")
    if not path.exists() or (force and not resume):
        return None
    if not resume:
        raise OutputError(
            f"{path} holds what a training that was stopped had reached",
            "go on with --resume, or start again with --force",
        )
    try:
        source = Source.at(path, CheckpointError)
        content = read_torch(source)
    except CheckpointError as error:
        raise CheckpointError(str(error), START_AGAIN) from None
    if not isinstance(content, dict) or content.get("format") != STATE:
        raise source.refuse("it is no state of `asapc train`", "remove it")
    of, ours = content.get("recipe"), header(recipe)["recipe"]
    if differing := next((key for key in ours if not isinstance(of, dict) or of.get(key) != ours[key]), None):
        theirs = of.get(differing) if isinstance(of, dict) else None
        raise OptionError(
            f"{path} is of another recipe: {differing} was {theirs!r}, and is {ours[differing]!r}"[:300],
            f"give the same recipe, options and number of processes, or {START_AGAIN}",
        )
    return content


def restore(run: Run, state: Mapping[str, Any], path: Path) -> None:
    """Bring a run to a state that was read from a file.

    Raises:
        CheckpointError: it does not fit the model.
    """
    try:
        run.restore(state)
        damaged = type(run.step) is not int or not 0 <= run.step <= run.recipe.steps
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        damaged = True
    if damaged:
        raise Source.at(path, CheckpointError).refuse("it is damaged", START_AGAIN)


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a file of torch.save."""
    buffer = io.BytesIO()  # on a full disk torch.save raises errors that do not say so
    torch.save(dict(content), buffer)
    path.write_bytes(buffer.getvalue())


@contextmanager
def reproducible() -> Iterator[None]:
    """Compute with one thread, whose sums have one order, and leave torch's own generator as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sharp plans are full of them, and they take many times as long
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
