"""Trained models compiled without retraining: what of the teacher's accuracy is kept, at what speed, on every task."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from asapc.commands.compile import compile_model
from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.errors import FidelityError
from asapc.training.evaluate import evaluate
from benchmarks.study.forms import BATCH, planned
from benchmarks.study.models import TASKS, facts, path_of, trained
from benchmarks.study.tables import half_width, percent, spread, table
from benchmarks.study.teachers import by_task, cases_of

QUICK_TASKS = ("digits", "pointset-inducing")
SECONDS, QUICK_SECONDS = 4.0, 1.0
RIVALS = ("teacher", "exact", "truncated", "softmax")
Row = dict[str, Any]


def cases(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return what compiles each task's model of each seed."""
    return cases_of(compile_teacher, quick, QUICK_TASKS if quick else TASKS)


def plans(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return what chooses the operators of the same models: the planner keeps them, so that each case finds its own."""
    return cases_of(plan, quick, QUICK_TASKS if quick else TASKS)


def plan(task: str, seed: int, quick: bool) -> Row:
    """Choose the operators of a model; nothing else is left of it."""
    planned(study(trained(task, "sinkhorn", seed, quick)))
    return {}


def compile_teacher(task: str, seed: int, quick: bool) -> Row:
    """Compile a model with the default budget; return the task's metric before and after, and ratios of times."""
    of_teacher, of_twin = (facts(task, attention, seed, quick) for attention in ("sinkhorn", "softmax"))
    row: Row = {
        "task": task,
        "seed": seed,
        "teacher": of_teacher["held_out_accuracy"],
        "softmax-trained": of_twin["held_out_accuracy"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "compiled.asap"
        seconds = QUICK_SECONDS if quick else SECONDS
        config = CompileConfig(out=folder, target="onnx", batches=(BATCH,), threads=1, seconds=seconds)
        try:
            report = compile_model(path_of(task, "sinkhorn", seed, quick), config)
        except FidelityError as error:
            return row | {"refused": str(error)}
        data = report.data
        return row | {
            "compiled": evaluate(folder).accuracy,
            "agreement": data["fidelity"]["agreement"],
            "error": data["fidelity"]["logits_rel"],
            "operators": sorted({site["choice"]["operator"] for site in data["sites"]}),
            "times": {ratio["name"]: ratio for ratio in data["latency"]["ratios"]},
            "warnings": data["latency"]["warnings"],
        }


def section(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the lines of this part of the page."""
    yield "## Compiled without retraining"
    yield ""
    yield (
        "Each task's model, trained with Sinkhorn and compiled with the default budget; mean and spread over seeds, "
        "per cent but for times. Matching has no classes to agree on. "
        f"Times are those of the whole model in ONNX Runtime at batch {BATCH}, one thread: how many times as long each "
        "rival takes as the compiled model, so below 1 the rival is faster. `truncated` is Sinkhorn of as many "
        "half-steps as the compiled operators have."
    )
    yield ""
    heads = (
        "task",
        "seeds",
        "teacher",
        "compiled",
        "kept",
        "agreement",
        "softmax-trained",
        *(f"{name}, time" for name in RIVALS),
    )
    lines = []
    for task, of_task in by_task(rows).items():
        done = [row for row in of_task if "compiled" in row]
        cells = [
            task,
            str(len(of_task)),
            percent([row["teacher"] for row in of_task]),
            percent([row["compiled"] for row in done]),
            percent([row["compiled"] / row["teacher"] for row in done]),
            percent([row["agreement"] for row in done if row["agreement"] is not None]),
            percent([row["softmax-trained"] for row in of_task]),
            *(spread([row["times"][name]["value"] for row in done]) for name in RIVALS),
        ]
        lines.append(cells)
    yield from table(heads, lines)
    yield ""
    yield f"Trained with Sinkhorn and not with softmax, in points: {', '.join(gains(rows))}."
    ratios = [ratio for row in rows.values() for ratio in row.get("times", {}).values()]
    widths = sorted(half_width(ratio["value"], ratio["low"], ratio["high"]) for ratio in ratios)
    yield (
        f"The 95 % intervals of single ratios of times reach {median(widths):.1%} to either side in the median, and "
        f"{widths[-1]:.0%} at most."
    )
    for row in rows.values():
        if "refused" in row:
            yield ""
            yield f"{row['task']}, seed {row['seed']}, was not compiled: {row['refused']}."


def gains(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield by how much of the metric the teachers of each task exceed their softmax twins."""
    for task, of_task in by_task(rows).items():
        yield f"{task} {100 * fmean(row['teacher'] - row['softmax-trained'] for row in of_task):+.1f}"


def kept(rows: Mapping[str, Row]) -> list[float]:
    """Return the share of the teacher's metric that each compiled model keeps, as means over seeds by task."""
    done = {name: row for name, row in rows.items() if "compiled" in row}
    return [fmean(row["compiled"] / row["teacher"] for row in of_seeds) for of_seeds in by_task(done).values()]
