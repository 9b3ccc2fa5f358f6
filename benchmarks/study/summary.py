"""The first table of the study's page: what was asked, and what was measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.study import downstream, frozen, training_cost
from benchmarks.study.tables import table

Rows = Mapping[str, Mapping[str, Any]]


def section(parts: Rows) -> Iterator[str]:
    """Yield the lines of the table, of the parts that are there."""
    lines = []
    if kept := downstream.kept(parts.get("downstream", {})):
        lines.append(
            (
                "compiled accuracy / teacher accuracy, no retraining: mean of tasks",
                "at least 0.99",
                f"{sum(kept) / len(kept):.3f}",
            )
        )
        lines.append(("the same, worst task", "at least 0.95", f"{min(kept):.3f}"))
    lines += frozen.summary(parts.get("frozen", {}))
    lines += training_cost.summary(parts.get("training-cost", {}))
    yield from table(("claim", "asked", "measured"), lines)
