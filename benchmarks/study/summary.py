"""The first table of the study's page: what was asked, and what was measured."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from benchmarks.study import downstream, frozen, training_cost
from benchmarks.study.forms import DEFAULT
from benchmarks.study.tables import spread, table
from benchmarks.study.teachers import by_task

Rows = Mapping[str, Any]
Line = tuple[str, str, str]


def section(parts: Mapping[str, Rows]) -> Iterator[str]:
    """Yield the lines of the table, of the parts that are there."""
    lines = [
        *of_downstream(parts.get("downstream", {})),
        *of_frozen(parts.get("frozen", {})),
        *of_training(parts.get("training-cost", {})),
    ]
    yield from table(("claim", "asked", "measured"), lines)


def of_downstream(rows: Rows) -> Iterator[Line]:
    """Yield what compiled models keep of accuracy."""
    if kept := downstream.kept(rows):
        claim = "compiled accuracy / teacher's accuracy, no retraining"
        yield f"{claim}: mean of the tasks", "at least 0.99", f"{fmean(kept):.3f}"
        yield "the same: worst task", "at least 0.95", f"{min(kept):.3f}"


def of_frozen(rows: Rows) -> Iterator[Line]:
    """Yield how much faster layers are, where loops are as long as those of the claim."""
    for task, of_seeds in by_task(rows).items():
        if of_seeds[0]["half_steps"] == frozen.CLAIM_HALF_STEPS:
            forms = [row["forms"][DEFAULT] for row in of_seeds]
            share = frozen.accuracy_share(of_seeds)
            speeds = spread([frozen.speed(form) for form in forms])
            asked = f"at least {frozen.CLAIM} at matched accuracy"
            yield f"frozen layer, times as fast as written: {task}", asked, f"{speeds} at {share:.3f} of the accuracy"


def of_training(rows: Rows) -> Iterator[Line]:
    """Yield the memory of training sliced transport beside that of training Sinkhorn."""
    for row in rows.values():
        sliced = row["bytes"].get(f"{training_cost.CLAIM_SLICES} slices")
        if row["length"] == training_cost.CLAIM_LENGTH and sliced:
            forms = {name: size for name, size in row["bytes"].items() if name.startswith("Sinkhorn") and size}
            ratios = ", ".join(f"{sliced / size:.1f} times {name}" for name, size in forms.items())
            yield (
                f"memory to train sliced transport, {training_cost.CLAIM_SLICES} slices, {row['length']} tokens",
                "substantially more",
                ratios,
            )
