"""Attention that a model was not trained with, put in its place, and what a short training of little brings back.

A model trained with softmax gets Sinkhorn. That, and a model trained with Sinkhorn, get hinges, and one pass, the
cheapest operator, at any error. In each, what the operators were fitted with is then trained on the task for a few
steps, alone and with the scales and shifts of the normalisations; all other weights stay.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import asapc
from asapc.backends.eager.runner import EagerRunner
from asapc.training.evaluate import score
from asapc.training.run import take_scaling_form
from asapc.training.tasks import Task, task
from benchmarks.study.models import trained
from benchmarks.study.tables import percent, table
from benchmarks.study.teachers import by_task, cases_of

TASKS = ("digits", "pointset")
STEPS, QUICK_STEPS, BATCH, LEARNING_RATE = 200, 3, 32, 1e-3
ANY = ("agreement>=0", "relc<=1")  # which nothing misses: this part is about what is lost
FORMS = {"hinges": "hinges", "one pass": "one-pass"}  # by what `--operators` calls them
SOFTMAX, SINKHORN = "trained with softmax", "trained with sinkhorn"
COLUMNS = AS_IS, NORMS, MAP, BOTH = "as it is", "norms trained", "map trained", "map and norms trained"
Row = dict[str, Any]


def cases(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return what swaps the attention of each task's models of each seed."""
    return cases_of(swap, quick, TASKS)


def swap(name: str, seed: int, quick: bool) -> Row:
    """Return the task's accuracy by what a model was trained with, what it has now, and what was trained since."""
    data, steps = task(name), QUICK_STEPS if quick else STEPS
    sinkhorn, softmax = (asapc.load_checkpoint(trained(name, kind, seed, quick)) for kind in ("sinkhorn", "softmax"))
    swapped = replace(sinkhorn, module=copy.deepcopy(sinkhorn.module))
    swapped.module.load_state_dict(softmax.module.state_dict())
    row: Row = {"task": name, "seed": seed, SOFTMAX: {"softmax": {AS_IS: accuracy(softmax.module, data)}}, SINKHORN: {}}
    for kind, model in ((SOFTMAX, swapped), (SINKHORN, sinkhorn)):
        of_kind = row[kind]
        of_kind["sinkhorn"] = {AS_IS: accuracy(model.module, data)}
        if kind == SOFTMAX:
            of_kind["sinkhorn"][NORMS] = fine_tuned(model.module, norms, data, steps, seed)
        for form, operators in FORMS.items():
            fast = asapc.accelerate(
                model.module, model.calibration.inputs, operators=operators, fidelity=ANY, threads=1, batches=BATCH
            )
            of_kind[form] = {
                AS_IS: accuracy(fast, data),
                MAP: fine_tuned(fast, coefficients, data, steps, seed),
                BOTH: fine_tuned(fast, lambda m: [*coefficients(m), *norms(m)], data, steps, seed),
            }
    return row


def accuracy(model: nn.Module, data: Task) -> float:
    """Return the accuracy of a model on held-out samples."""
    return score(EagerRunner(model), data.held_out)


def coefficients(model: Any) -> Sequence[nn.Parameter]:
    """Return what the operators of an accelerated model were fitted with."""
    return list(model.operator_parameters())


def norms(model: nn.Module) -> Sequence[nn.Parameter]:
    """Return the scales and shifts of the layer norms of a model."""
    return [p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]


def fine_tuned(
    model: nn.Module, parameters_of: Callable[[Any], Sequence[nn.Parameter]], data: Task, steps: int, seed: int
) -> float:
    """Train some parameters of a copy of a model, and return its accuracy then."""
    model = copy.deepcopy(model)
    take_scaling_form(model)
    parameters = parameters_of(model)
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of augmentation
    for _ in range(steps):
        batch = data.augment(data.training[torch.randint(len(data.training), (BATCH,), generator=draw).tolist()])
        loss = data.loss(model(*batch.inputs.values()), batch.labels)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return accuracy(model, data)


def section(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the lines of this part of the page."""
    yield "## Attention that a model was not trained with"
    yield ""
    yield (
        "Held-out accuracy, per cent. Nothing but the named part is trained, for "
        f"{STEPS} steps of {BATCH} samples; *map* is what the operators were fitted with, which Sinkhorn has not. "
        "Hinges, and one pass, are taken here whatever their error, without a budget."
    )
    yield ""
    yield from table(("task", "trained with", "now has", *COLUMNS), lines(rows))


def lines(rows: Mapping[str, Row]) -> Iterator[Sequence[str]]:
    """Yield the lines of the table: a line for what each model has now."""
    for name, of_task in by_task(rows).items():
        for kind in (SOFTMAX, SINKHORN):
            for now in of_task[0][kind]:
                of_now = [row[kind][now] for row in of_task]
                cells = [percent([values[column] for values in of_now if column in values]) for column in COLUMNS]
                yield [name, kind.removeprefix("trained with "), now, *cells]
