"""What training costs: memory and time of a step of softmax, Sinkhorn and sliced transport, at equal sizes.

Each step's memory is that of a process of its own; times are of steps that take turns in one process.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from asapc.pictures import decades, new_figure, save
from asapc.timing.rounds import time_rounds
from benchmarks.intervals import median_ratio
from benchmarks.study.step import BATCH, HEADS, ITERATIONS, SIZE, SLICES, Step, inputs, kernels, peak

LENGTHS, QUICK_LENGTHS = (64, 128, 256, 512, 1024), (64, 128)
QUICK_KERNELS = ("softmax", "Sinkhorn, log", "Sinkhorn, recompute", "8 slices")
LOOP = "Sinkhorn, log"  # as users write it; all times are ratios to its own
SECONDS, MIN_ROUNDS, RESAMPLES = 20.0, 2, 999  # a round of the longest takes half a minute
CLAIM_LENGTH, CLAIM_SLICES = 256, max(SLICES)
FIGURE = "study-training_cost.png"
Row = dict[str, Any]


def cases(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return a case for each length."""
    names, seconds = (QUICK_KERNELS, 0.5) if quick else (tuple(kernels()), SECONDS)
    return {f"{n} tokens": partial(measure, n, names, seconds) for n in (QUICK_LENGTHS if quick else LENGTHS)}


def measure(length: int, names: tuple[str, ...], seconds: float) -> Row:
    """Measure a step of each attention at one length; one that does not fit into memory has None and no time."""
    peaks = {name: peak(name, length) for name in names}
    steps = {name: Step(kernel) for name, kernel in kernels().items() if peaks.get(name) is not None}
    times = time_rounds(steps, inputs(length), BATCH, seconds, rounds=MIN_ROUNDS)
    return {
        "length": length,
        "batch": BATCH,
        "heads": HEADS,
        "head_size": SIZE,
        "iterations": ITERATIONS,
        "threads": torch.get_num_threads(),
        "rounds": len(times[LOOP]),
        "bytes": peaks,
        "ms": {name: median(of_name) for name, of_name in times.items()},
        "times_loop": {name: median_ratio(times[name], times[LOOP], 0, RESAMPLES) for name in times if name != LOOP},
    }


def section(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the section: memory, time, and the claim on sliced transport."""
    ordered = sorted(rows.values(), key=lambda row: row["length"])
    first = ordered[0]
    yield "## Training cost"
    yield ""
    yield (
        f"One attention layer, forward and backward: batch {first['batch']}, {first['heads']} heads of "
        f"{first['head_size']}, {first['iterations']} iterations, {first['threads']} "
        f"thread{'s' * (first['threads'] > 1)}, random points. Sinkhorn has three forms: the loop in the log domain, "
        "as it is mostly written; scalings with a gradient of their own; and these with the matrices computed again on "
        "the way back. Sliced transport sorts softly along as many slices."
    )
    yield ""
    yield f"![Memory and time of a training step by the number of tokens]({FIGURE})"
    yield ""
    names = list(first["bytes"])
    yield "| tokens | " + " | ".join(names) + " |"
    yield "|---:|" + "---:|" * len(names)
    for row in ordered:
        yield f"| {row['length']} | " + " | ".join(megabytes(row["bytes"][name]) for name in names) + " |"
    yield ""
    yield "How much the process grows in a step, in MB. And its time in multiples of the loop's, with 95 % intervals:"
    yield ""
    others = [name for name in names if name != LOOP]
    yield f"| tokens | {LOOP} (ms) | " + " | ".join(others) + " |"
    yield "|---:|---:|" + "---:|" * len(others)
    for row in ordered:
        cells = " | ".join(times_loop(row, name) for name in others)
        yield f"| {row['length']} | {row['ms'][LOOP]:.1f} | {cells} |"
    yield ""
    yield from (claim(row) for row in ordered if row["length"] == CLAIM_LENGTH)


def megabytes(size: int | None) -> str:
    """Return a number of bytes in megabytes."""
    return "does not fit" if size is None else f"{size / 1e6:.1f}"


def times_loop(row: Row, name: str) -> str:
    """Return the ratio of an attention's time to that of the loop, with its interval."""
    if name not in row["times_loop"]:
        return ""
    ratio, low, high = row["times_loop"][name]
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"


def claim(row: Row) -> str:
    """Say how sliced transport with most slices compares with each form of Sinkhorn, at one length."""
    sliced = f"{CLAIM_SLICES} slices"
    if row["bytes"].get(sliced) is None:
        return f"At {row['length']} tokens, {sliced} were not measured."
    forms = [name for name, size in row["bytes"].items() if name.startswith("Sinkhorn") and size]
    of_loop = {name: ratio for name, (ratio, _, _) in row["times_loop"].items()}
    memory, time = (
        ", ".join(f"{values[sliced] / values.get(form, 1.0):.1f} ({form.partition(', ')[2]})" for form in forms)
        for values in (row["bytes"], of_loop)  # the loop itself is what times are multiples of
    )
    return (
        f"At {row['length']} tokens a step of sliced transport with {sliced} takes {megabytes(row['bytes'][sliced])} "
        f"MB. Of what Sinkhorn takes in each form, that is, in multiples: {memory}. And of its time: {time}."
    )


def draw(rows: Mapping[str, Row], folder: Path) -> None:
    """Draw memory and time by length: Sinkhorn in one colour, sliced transport in another."""
    ordered = sorted(rows.values(), key=lambda row: row["length"])
    figure = new_figure((9, 4.2))
    memory, time = figure.subplots(1, 2)
    for axes, field, scale, title in ((memory, "bytes", 1e-6, "memory of a step, MB"), (time, "ms", 1.0, "time, ms")):
        values = []
        for name in ordered[0]["bytes"]:
            points = [(row["length"], row[field][name] * scale) for row in ordered if row[field].get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style(name))
                values += [value for _, value in points]
        lengths = [row["length"] for row in ordered]
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axes.set_xticks(lengths, labels=[str(length) for length in lengths], minor=False)
        axes.set_xticks([], minor=True)
        decades(axes, values)
        axes.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, folder / FIGURE)


def style(name: str) -> dict[str, Any]:
    """Return how the line of an attention looks: a colour for each kind, a dash or a shade for each form."""
    if name.startswith("Sinkhorn"):
        return {"color": "C0", "linestyle": {"log": "-", "scaling": "--", "recompute": ":"}[name.partition(", ")[2]]}
    if name.endswith("slices"):
        number = SLICES.index(int(name.partition(" ")[0]))
        return {"color": "C1", "alpha": (0.45, 0.7, 1.0)[number], "linewidth": 1.2 + 0.5 * number}
    return {"color": "black"}
