"""Which teachers the parts of the study look at, and their cases and rows."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.study.models import seeds

TASKS, QUICK_TASKS = ("digits", "mnist", "pointset", "mails"), ("digits",)
Row = dict[str, Any]


def cases_of(
    measure: Callable[[str, int, bool], Row], quick: bool, tasks: Sequence[str]
) -> dict[str, Callable[[], Row]]:
    """Return a case for each seed and task, of a function of task, seed and whether it is quick."""
    return {f"{task}, seed {seed}": partial(measure, task, seed, quick) for seed in seeds(quick) for task in tasks}


def by_task(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Return the rows of each task's seeds."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows.values():
        groups[row["task"]].append(row)
    return dict(groups)


def count_seeds(rows: Sequence[Row]) -> str:
    """Say how many seeds there are."""
    return f"{len(rows)} seed{'s' * (len(rows) > 1)}"
