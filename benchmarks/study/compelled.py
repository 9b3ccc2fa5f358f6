"""The second paper (arXiv 2311.18022, ICML 2025): its table, what its ten points are, and its activations in a model.

Networks of width 4 with 5 hidden layers approximate four functions on [0, 1]. They start as Kaiming has it, by the
construction with peaks at random, or from peaks that were trained first. All weights are trained in the end, in two
ways: as `asapc.relu.fit` does, or by Adam as in the paper.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asapc.models.digits import HELD_OUT, SPLIT_SEED, load_digits
from asapc.pictures import new_figure, save
from asapc.relu.approx import parse_function
from asapc.relu.fit import fit, fit_manifold, random_networks, train
from asapc.relu.networks import MIN_PEAK, Manifold, ReLUNetworks, evaluate, to_networks, to_peaks
from benchmarks.relu import (
    DEPTH,
    FEW,
    PAPER,
    PAPER_FEW,
    POINTS,
    RUNS,
    SEED,
    SETS,
    WAYS,
    descend,
    fit_perceptron,
)

PEAK_STEPS, FREE_STEPS, PEAK_RATE, FREE_RATE = 1000, 1000, 1e-2, 1e-3
QUICK_RUNS, QUICK_STEPS = 3, 60
POINT_SETS, DRAWS = 10, 5
SEEDS, WIDTHS, DIGITS_STEPS, BATCH = range(5), (8, 16, 32), 3000, 64
FIGURE = "study-compelled.png"
STARTS, FUNCTIONS = tuple(PAPER), tuple(PAPER_FEW["pretraining"])
Row = dict[str, Any]


def unit(count: int) -> Tensor:
    """Return evenly spaced points of [0, 1], both ends among them."""
    return torch.linspace(0, 1, count, dtype=torch.float64)


def at_random(draw: int) -> Tensor:
    """Return ten points of [0, 1], in ascending order."""
    generator = torch.Generator().manual_seed(draw)
    return torch.rand(FEW, generator=generator, dtype=torch.float64).sort().values


TENTHS = torch.arange(FEW, dtype=torch.float64) / FEW
DESIGNS: dict[str, Tensor] = {
    "even, with both ends": unit(FEW),
    "even, with neither end": TENTHS + 0.5 / FEW,
    "even, without 1": TENTHS,
    "even, without 0": TENTHS + 1 / FEW,
    "every other of twenty even ones, from 0": unit(2 * FEW)[::2],
    "every other of twenty even ones, to 1": unit(2 * FEW)[1::2],
    "Chebyshev": (1 - torch.cos(math.pi * (TENTHS + 0.5 / FEW))) / 2,
    **{f"at random, draw {draw}": at_random(draw) for draw in range(DRAWS)},
}


def values(texts: Sequence[str], x: Tensor) -> Tensor:
    """Return the values (F, P) of functions at points (P,)."""
    return torch.stack([parse_function(text)(x) for text in texts])


def errors(networks: ReLUNetworks, texts: Sequence[str], x: Tensor) -> Tensor:
    """Return the mean squared errors (F, R) at points (P,), of R networks for each function."""
    with torch.no_grad():
        outputs = torch.unflatten(networks(x), 0, (len(texts), -1))
        return (outputs - values(texts, x).unsqueeze(1)).square().mean(dim=-1)


def by_adam(start: str, x: Tensor, y: Tensor, runs: int, peak_steps: int, free_steps: int) -> ReLUNetworks:
    """Train as the paper does, by Adam: with pretraining the peaks first, then all weights.

    Args:
        start: "Kaiming", "construction" or "pretraining".
        x: (P,) points in [0, 1], which is the interval of all tents.
        y: (F, P) values.
        runs: starts for each function.
        peak_steps: of the first stage.
        free_steps: of the second.
    """
    target = y.repeat_interleave(runs, dim=0)

    def loss(outputs: Tensor) -> Tensor:
        return (outputs - target).square().mean(dim=-1).sum()  # the sum trains each network on an error of its own

    if start == "Kaiming":
        networks = random_networks(x, y.shape[0], runs, DEPTH, SEED, "kaiming")
    else:
        point = fit_manifold(x, y, DEPTH, runs, 1, SEED, steps=0)
        logits = ((point.peaks - MIN_PEAK) / (1 - 2 * MIN_PEAK)).logit()
        parameters = [part.clone().requires_grad_() for part in (logits, point.scale, point.slope, point.intercept)]

        def on_manifold() -> Manifold:
            return Manifold(to_peaks(parameters[0]), *parameters[1:])

        if start == "pretraining":
            # By the chain rule the same gradient as through the weights that follow from the peaks.
            descend(parameters, lambda: loss(evaluate(on_manifold(), x)), peak_steps, PEAK_RATE)
        with torch.no_grad():
            networks = to_networks(on_manifold())
    descend(networks.parameters(), lambda: loss(networks(x)), free_steps, FREE_RATE)
    return networks


def by_marquardt(start: str, x: Tensor, y: Tensor, runs: int) -> ReLUNetworks:
    """Train as asapc does, by Levenberg-Marquardt; `start` and the others as in `by_adam`."""
    if start == "Kaiming":
        return train(random_networks(x, y.shape[0], runs, DEPTH, SEED, "kaiming"), x, y, 1).networks
    if start == "construction":
        return train(to_networks(fit_manifold(x, y, DEPTH, runs, 1, SEED, steps=0)), x, y, 1).networks
    return fit(x, y, DEPTH, runs, seed=SEED).networks


def by_least_squares_alone(x: Tensor, y: Tensor, runs: int) -> ReLUNetworks:
    """Pretrain, then free all weights on the samples, however few."""
    return train(to_networks(fit_manifold(x, y, DEPTH, runs, 1, SEED)), x, y, 1).networks


def cases(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return a case for each function and number of points, for each choice of ten points, and for each activation."""
    counts = {POINTS: 1, FEW: SETS}
    widths = WIDTHS[:1] if quick else WIDTHS
    return {
        **{
            f"table, {text}, {count} points": partial(table, text, count, 1 if quick else sets, quick)
            for text in FUNCTIONS
            for count, sets in counts.items()
        },
        **{f"ten points, {design}": partial(ten_points, design, quick) for design in DESIGNS},
        **{f"digits, {way}, width {width}": partial(digits, way, width, quick) for width in widths for way in WAYS},
    }


def table(text: str, count: int, sets: int, quick: bool) -> Row:
    """Fit one function from every start in both ways; errors are those on 500 points."""
    x, y = unit(count), values([text], unit(count))
    runs, peak_steps, free_steps = (QUICK_RUNS, QUICK_STEPS, QUICK_STEPS) if quick else (RUNS, PEAK_STEPS, FREE_STEPS)
    row: Row = {"part": "table", "function": text, "points": count, "runs": runs, "sets": sets, "errors": {}}
    for start in STARTS:
        fits = {
            "Adam": by_adam(start, x, y, runs * sets, peak_steps, free_steps),
            "Levenberg-Marquardt": by_marquardt(start, x, y, runs * sets),
        }
        row["errors"][start] = {way: summary(errors(fits[way], [text], unit(POINTS))[0], runs) for way in fits}
    return row


def summary(of_runs: Tensor, runs: int) -> Row:
    """Return the least error of each set of runs, and the mean."""
    return {"least": of_runs.reshape(-1, runs).amin(dim=1).tolist(), "mean": of_runs.mean().item()}


def digits(way: str, width: int, quick: bool) -> Row:
    """Train a network of two hidden layers on the digits with one of the activations."""
    images, labels = load_digits()
    images = images.flatten(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    loss = partial(batch_loss, images=images[training], labels=labels[training])
    accuracies = []
    for seed in SEEDS[:1] if quick else SEEDS:
        torch.manual_seed(seed)
        network = fit_perceptron(way, (images.shape[1], width, 10), loss, QUICK_STEPS if quick else DIGITS_STEPS)
        with torch.no_grad():
            hits = network(images[held_out]).argmax(dim=-1) == labels[held_out]
        accuracies.append(hits.double().mean().item())
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"part": "digits", "activation": way, "width": width, "weights": weights, "accuracies": accuracies}


def batch_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy on a random batch."""
    index = torch.randint(len(images), (BATCH,))
    return F.cross_entropy(network(images[index]), labels[index])


def ten_points(design: str, quick: bool) -> Row:
    """Fit all functions to ten points; judge on 500 points, on other choices of ten, and on ten at random."""
    x = DESIGNS[design]
    runs, peak_steps, free_steps = (QUICK_RUNS, QUICK_STEPS, QUICK_STEPS) if quick else (RUNS, PEAK_STEPS, FREE_STEPS)
    sets = 1 if quick else POINT_SETS
    y = values(FUNCTIONS, x)
    fits = {
        "Adam": by_adam("pretraining", x, y, runs * sets, peak_steps, free_steps),
        "Levenberg-Marquardt": by_least_squares_alone(x, y, runs * sets),
        "Kaiming, Adam": by_adam("Kaiming", x, y, runs * sets, peak_steps, free_steps),
    }
    judges = {f"{POINTS} points": unit(POINTS), **{name: points for name, points in DESIGNS.items() if name != design}}
    least: Row = {}
    for way, networks in fits.items():
        least[way] = {}
        for judge, points in judges.items():
            of_sets = errors(networks, FUNCTIONS, points).unflatten(1, (sets, runs)).amin(dim=-1)
            least[way][judge] = dict(zip(FUNCTIONS, of_sets.tolist(), strict=True))
    return {"part": "points", "design": design, "runs": runs, "sets": sets, "least": least}


def section(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the section: the paper's table, what explains its ten points, and activations on the digits."""
    tables, points, models = (
        [row for row in rows.values() if row["part"] == part] for part in ("table", "points", "digits")
    )
    yield "## The second paper"
    yield ""
    yield (
        "ReLU networks of width 4 with 5 hidden layers, compelled to have 32 pieces at the start ([ReLU networks](relu.md)), "
        f"beside the paper's table. MSE on {POINTS} points; the least, and after the comma the mean."
    )
    for count in (POINTS, FEW):
        yield from table_of([row for row in tables if row["points"] == count], count)
    if points:
        yield from points_of(points)
    if models:
        yield from models_of(models)


def table_of(rows: Sequence[Row], count: int) -> Iterator[str]:
    """Yield the table of one number of points."""
    if not rows:
        return
    yield ""
    yield f"Trained on {count} points, {rows[0]['runs']} starts, {in_sets(rows[0]['sets'])}:"
    yield ""
    yield "| function | start | Adam | Levenberg-Marquardt | paper |"
    yield "|---|---|---:|---:|---:|"
    for row in rows:
        for start, ways in row["errors"].items():
            ours = " | ".join(f"{spread(way['least'])}, {way['mean']:.1e}" for way in ways.values())
            yield f"| {row['function']} | {start} | {ours} | {of_paper(start, row['function'], count)} |"


def in_sets(sets: int) -> str:
    """Say how many sets of starts there are."""
    return f"{sets} sets of them" if sets > 1 else "one set of them"


def spread(numbers: Sequence[float]) -> str:
    """Return the least and the largest, or one number where they read the same."""
    low, high = f"{min(numbers):.2e}", f"{max(numbers):.2e}"
    return low if low == high else f"{low} to {high}"


def of_paper(start: str, function: str, count: int) -> str:
    """Return the paper's figures, where it has any."""
    if count == FEW:
        figure = PAPER_FEW.get(start, {}).get(function)
        return "" if figure is None else f"{figure:.2e}"
    pair = PAPER[start].get(function)
    return "" if pair is None else f"{pair[0]:.2e}, {pair[1]:.2e}"


def models_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of activations."""
    yield ""
    yield (
        f"Digits, {HELD_OUT} of them held out, by networks of two hidden layers: accuracy, mean over "
        f"{len(rows[0]['accuracies'])} seeds, least and most, and the weights."
    )
    yield ""
    widths = sorted({row["width"] for row in rows})
    yield "| activation | " + " | ".join(f"width {width} | weights" for width in widths) + " |"
    yield "|---|" + "---:|---:|" * len(widths)
    for way in dict.fromkeys(row["activation"] for row in rows):
        of_way = sorted((row for row in rows if row["activation"] == way), key=lambda row: row["width"])
        yield f"| {way} | " + " | ".join(f"{accuracy(row)} | {row['weights']}" for row in of_way) + " |"


def accuracy(row: Row) -> str:
    """Return the mean accuracy in per cent, with the least and the most."""
    low, mean, high = (100 * of(row["accuracies"]) for of in (min, fmean, max))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def draw(rows: Mapping[str, Row], folder: Path) -> None:
    """Draw accuracy on the digits by weights, a line for each activation."""
    figure = new_figure((6, 3.6))
    axes = figure.subplots()
    models = [row for row in rows.values() if row["part"] == "digits"]
    for way in dict.fromkeys(row["activation"] for row in models):
        of_way = sorted((row for row in models if row["activation"] == way), key=lambda row: row["width"])
        weights, means = zip(*((row["weights"], 100 * fmean(row["accuracies"])) for row in of_way), strict=True)
        axes.plot(weights, means, marker="o", markersize=4, label=way)
    ticks = sorted({row["weights"] for row in models if row["activation"] == "ReLU"})
    axes.set(xscale="log", xlabel="weights", ylabel="digits, accuracy in %")
    axes.set_xticks(ticks, labels=[str(weights) for weights in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, folder / FIGURE)
