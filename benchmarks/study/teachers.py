"""Which teachers the parts of the study look at, and their cases and rows."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.study.models import seeds as model_seeds

TASKS, QUICK_TASKS = ("digits", "mnist", "pointset", "mails"), ("digits",)
Row = dict[str, Any]


def cases_of(measure: Callable[[str, int, bool], Row], quick: bool) -> dict[str, Callable[[], Row]]:
    """Return a case for each task and seed, of a function of task, seed and whether it is quick."""
    return {
        f"{task}, seed {seed}": partial(measure, task, seed, quick)
        for task in (QUICK_TASKS if quick else TASKS)
        for seed in model_seeds(quick)
    }


def by_task(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Return the rows of each task's seeds."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows.values():
        groups[row["task"]].append(row)
    return dict(groups)


def seeds(rows: list[Row]) -> str:
    """Say how many seeds there are."""
    return f"{len(rows)} seed{'s' * (len(rows) > 1)}"
