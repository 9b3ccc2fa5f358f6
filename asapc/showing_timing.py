"""The results of `bench` and `check` as tables and sentences."""

from collections.abc import Iterator
from typing import Any

from asapc.showing import Grid, Row, fixed, plus_minus
from asapc.writing.words import reached


def check(data: dict[str, Any]) -> Iterator[Grid | str]:
    """Show what a gate says: the verdict first, then each term of the budget and each batch size."""
    ends = {
        "passed": "PASSED",
        "fidelity": "FAILED on fidelity",
        "regression": "FAILED: slower",
        "unstable": "UNDECIDED: latency was not stable",
    }
    against = "" if data["against"] is None else f" against {data['against']}"
    yield f"{ends[data['outcome']]}: {data['folder']}{against}"
    rows: list[Row] = [(term["term"], reached(term), result(term["met"])) for term in data["verdict"]["terms"]]
    yield Grid("Fidelity", ("budget", "reached", "result"), ("budget", "result"), [rows])
    if data["gates"]:
        yield gates_grid(data["gates"])
    for gate in data["gates"]:
        yield f"batch {gate['batch']}: {gate['reason']}"
    yield from (f"warning: {line}" for line in data["warnings"])


def result(met: bool) -> str:
    """Say whether a term is kept."""
    return "passed" if met else "missed"


def gates_grid(gates: list[dict[str, Any]]) -> Grid:
    """Show latency beside what it is held to."""
    rows: list[Row] = [
        (
            str(gate["batch"]),
            fixed(gate["ms"], 3),
            fixed(gate["other_ms"], 3),
            plus_minus(gate["slowdown"], 3),
            f"{1 + gate['max_slowdown']:.2f}",
            f"{gate['noise_floor']:.1%}" if gate["ms"] is not None else "",
            gate["outcome"],
        )
        for gate in gates
    ]
    columns = ("batch", "ms", "other", "ratio", "limit", "noise", "result")
    return Grid("Latency, medians and the ratio of the two", columns, ("result",), [rows])


def bench(data: dict[str, Any]) -> Iterator[Grid | str]:
    """Show measurements side by side."""
    for measurement in data["measurements"]:
        length = "" if measurement["length"] is None else f", length {measurement['length']}"
        threads = f"{measurement['threads']} thread{'s' * (measurement['threads'] != 1)}"
        rows: list[Row] = [
            (
                row["name"],
                *(fixed(row[key], 3) for key in ("p50_ms", "p90_ms", "p99_ms")),
                plus_minus(row["ratio"], 3),
                "" if row["ratio"] is None else row["ratio"]["finding"],
            )
            for row in measurement["rows"]
        ]
        title = f"Batch {measurement['batch']}{length}, {measurement['runtime']}, {threads}, ms a batch"
        columns = ("model", "median", "p90", "p99", "ratio", "than the first")
        yield Grid(title, columns, ("model", "than the first"), [rows])
        yield (
            f"{measurement['blocks']} blocks of fresh sessions; {data['first']} to itself may be off by "
            f"{measurement['noise_floor']:.1%}"
        )
        yield from (f"warning: {line}" for line in measurement["warnings"])
    yield from (f"warning: {line}" for line in data["warnings"])


def bench_rows(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return measurements as the rows of one flat table, for CSV."""
    for measurement in data["measurements"]:
        for row in measurement["rows"]:
            facts = {
                key: measurement[key] for key in ("runtime", "threads", "length", "batch", "blocks", "noise_floor")
            }
            ratio = row["ratio"] or dict.fromkeys(("value", "low", "high", "finding"))
            own = {key: value for key, value in row.items() if key not in ("ratio", "ms")}
            yield {**facts, **own, **{f"ratio_{key}": value for key, value in ratio.items()}}
