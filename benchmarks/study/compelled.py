"""The second paper (arXiv 2311.18022, ICML 2025): its table, what its ten points are, and its activations in a model.

Networks of width 4 with 5 hidden layers approximate four functions on [0, 1]. They start as Kaiming has it, by the
construction with peaks at random, or from peaks that were trained first. All weights are trained in the end, in two
ways: as `asapc.relu.fit` does, or by Adam as in the paper.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asapc.pictures import new_figure, save
from asapc.relu.approx import parse_function
from asapc.relu.fit import fit, fit_manifold, random_networks, train
from asapc.relu.networks import MIN_PEAK, Manifold, ReLUNetworks, evaluate, to_networks, to_peaks
from asapc.training.tasks import HELD_OUT, task
from asapc.types.samples import Samples
from benchmarks.relu import DEPTH, FEW, PAPER, PAPER_FEW, POINTS, RUNS, SEED, WAYS, descend, fit_perceptron

PEAK_RATE, FREE_RATE, DRAWS, BATCH = 1e-2, 1e-3, 3, 64
FIGURE, CLOSEST = "study-compelled.png", 3
PARTS = ("table", "schedule", "points", "digits")
STARTS, FUNCTIONS = tuple(PAPER), tuple(PAPER_FEW["pretraining"])
Row = dict[str, Any]


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
        runs: starts of which the least counts.
        sets: such sets in the table's rows of ten points.
        many_sets: such sets where orders of training are compared.
        steps: of Adam, in each stage.
        seeds: of models on the digits.
        widths: of these.
        digits_steps: of their training.
    """

    runs: int
    sets: int
    many_sets: int
    steps: int
    seeds: tuple[int, ...]
    widths: tuple[int, ...]
    digits_steps: int


FULL = Sizes(RUNS, 3, 10, 1000, (0, 1, 2), (8, 16, 32), 2000)
QUICK = Sizes(3, 1, 1, 60, (0,), (8,), 200)


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


def start_of(start: str, x: Tensor, y: Tensor, runs: int, peak_steps: int) -> ReLUNetworks:
    """Return networks before all their weights are trained.

    Args:
        start: "Kaiming"; "construction", with peaks at random; or "pretraining", with peaks that Adam trained.
        x: (P,) points in [0, 1], which is the interval of all tents.
        y: (F, P) values.
        runs: starts for each function.
        peak_steps: of pretraining.
    """
    if start == "Kaiming":
        return random_networks(x, y.shape[0], runs, DEPTH, SEED, "kaiming")
    point = fit_manifold(x, y, DEPTH, runs, 1, SEED, steps=0)
    logits = ((point.peaks - MIN_PEAK) / (1 - 2 * MIN_PEAK)).logit()
    parameters = [part.clone().requires_grad_() for part in (logits, point.scale, point.slope, point.intercept)]

    def on_manifold() -> Manifold:
        return Manifold(to_peaks(parameters[0]), *parameters[1:])

    if start == "pretraining":
        # By the chain rule the same gradient as through the weights that follow from the peaks.
        descend(parameters, lambda: loss(evaluate(on_manifold(), x), y), peak_steps, PEAK_RATE)
    with torch.no_grad():
        return to_networks(on_manifold())


def by_adam(networks: ReLUNetworks, x: Tensor, y: Tensor, steps: int) -> ReLUNetworks:
    """Train all weights by Adam, in place."""
    descend(networks.parameters(), lambda: loss(networks(x), y), steps, FREE_RATE)
    return networks


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the errors of all runs, by which each is trained on its own."""
    target = y.repeat_interleave(outputs.shape[0] // y.shape[0], dim=0)
    return (outputs - target).square().mean(dim=-1).sum()


def by_marquardt(start: str, x: Tensor, y: Tensor, runs: int) -> ReLUNetworks:
    """Train as asapc does, from a start as in `start_of`."""
    if start == "pretraining":
        return fit(x, y, DEPTH, runs, seed=SEED).networks
    return train(start_of(start, x, y, runs, 0), x, y, 1).networks


def cases(quick: bool) -> dict[str, Callable[[], Row]]:
    """Return a case for each row of the paper's table, each order of training, choice of points, and activation."""
    sizes = QUICK if quick else FULL
    return {
        **{
            f"table, {text}, {count} points": partial(table, text, count, sizes)
            for text in FUNCTIONS
            for count in (POINTS, FEW)
        },
        **{f"schedule, {text}": partial(schedule, text, sizes) for text in FUNCTIONS},
        **{f"ten points, {design}": partial(ten_points, design, sizes) for design in DESIGNS},
        **{f"digits, {way}, width {n}": partial(digits, way, n, sizes) for n in sizes.widths for way in WAYS},
    }


def table(text: str, count: int, sizes: Sizes) -> Row:
    """Fit one function from every start in both ways; errors are those on 500 points."""
    x, y, runs = unit(count), values([text], unit(count)), sizes.runs
    sets = sizes.sets if count == FEW else 1
    row: Row = {"part": "table", "function": text, "points": count, "runs": runs, "errors": {}}
    for start in STARTS:
        ways = {
            "Adam": by_adam(start_of(start, x, y, runs * sets, sizes.steps), x, y, sizes.steps),
            "Levenberg-Marquardt": by_marquardt(start, x, y, runs * sets),
        }
        row["errors"][start] = {way: summary(errors(ways[way], [text], unit(POINTS))[0], runs) for way in ways}
    return row


def summary(of_runs: Tensor, runs: int) -> Row:
    """Return the least error of each set of runs; and of all of them the median, and the mean."""
    least = of_runs.reshape(-1, runs).amin(dim=1).tolist()
    return {"least": least, "median": of_runs.median().item(), "mean": of_runs.mean().item()}


def schedule(text: str, sizes: Sizes) -> Row:
    """Pretrain on ten points for so many steps or to the end, then free the weights in either way."""
    x, y = unit(FEW), values([text], unit(FEW))
    runs, sets = sizes.runs, sizes.many_sets
    row: Row = {"part": "schedule", "function": text, "runs": runs, "errors": {}}
    stages = {
        f"for {sizes.steps:,} steps": start_of("pretraining", x, y, runs * sets, sizes.steps),
        "to the end": to_networks(fit_manifold(x, y, DEPTH, runs * sets, 1, SEED)),
    }
    for stage, begin in stages.items():
        ways = {
            "none": begin,
            "Levenberg-Marquardt": train(begin, x, y, 1).networks,
            "Adam": by_adam(copy.deepcopy(begin), x, y, sizes.steps),
        }
        row["errors"][stage] = {way: summary(errors(ways[way], [text], unit(POINTS))[0], runs) for way in ways}
    return row


def ten_points(design: str, sizes: Sizes) -> Row:
    """Fit all functions to ten points as the paper does; judge on 500 points, and on all other choices of ten."""
    x, y = DESIGNS[design], values(FUNCTIONS, DESIGNS[design])
    judges = {f"{POINTS} points": unit(POINTS), **{name: points for name, points in DESIGNS.items() if name != design}}
    row: Row = {"part": "points", "design": design, "runs": sizes.runs, "least": {}}
    for start in ("Kaiming", "pretraining"):
        networks = by_adam(start_of(start, x, y, sizes.runs, sizes.steps), x, y, sizes.steps)
        row["least"][start] = {
            judge: dict(zip(FUNCTIONS, errors(networks, FUNCTIONS, points).amin(dim=1).tolist(), strict=True))
            for judge, points in judges.items()
        }
    return row


def digits(way: str, width: int, sizes: Sizes) -> Row:
    """Train a network of two hidden layers on the digits with one of the activations."""
    data = task("digits")
    (images, labels), (held_out, answers) = pixels(data.training), pixels(data.held_out)
    loss = partial(batch_loss, images=images, labels=labels)
    accuracies = []
    for seed in sizes.seeds:
        torch.manual_seed(seed)
        network = fit_perceptron(way, (images.shape[1], width, 10), loss, sizes.digits_steps)
        with torch.no_grad():
            hits = network(held_out).argmax(dim=-1) == answers
        accuracies.append(hits.double().mean().item())
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"part": "digits", "activation": way, "width": width, "weights": weights, "accuracies": accuracies}


def pixels(samples: Samples) -> tuple[Tensor, Tensor]:
    """Return images as vectors (samples, pixels), and their labels."""
    assert samples.labels is not None
    return samples.inputs["images"].flatten(1), samples.labels


def batch_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy on a random batch."""
    index = torch.randint(len(images), (BATCH,))
    return F.cross_entropy(network(images[index]), labels[index])


def section(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the section: the paper's table, what explains its ten points, and activations on the digits."""
    of = {part: [row for row in rows.values() if row["part"] == part] for part in PARTS}
    yield "## The second paper"
    yield ""
    yield (
        f"ReLU networks of width 4 with {DEPTH} hidden layers ([ReLU networks](relu.md)), from Kaiming's start, from "
        "the construction with peaks at random, and from the construction after pretraining, which moves the peaks "
        f"alone. Then all weights are trained: by Adam for {FULL.steps:,} steps, as many as it pretrains for, which is "
        "the paper's order but perhaps not its number of steps; or by Levenberg-Marquardt, from pretraining as "
        "`asapc approx` does it, with peaks trained to the end."
    )
    for count in (POINTS, FEW):
        yield from table_of([row for row in of["table"] if row["points"] == count], count)
    yield from schedules_of(of["schedule"])
    yield from points_of(of["points"])
    yield from models_of(of["digits"])
    yield from ("", f"![Errors on ten points by order of training, and accuracy on digits by weights]({FIGURE})")


def table_of(rows: Sequence[Row], count: int) -> Iterator[str]:
    """Yield the table of one number of points."""
    if not rows:
        return
    yield ""
    sets = len(rows[0]["errors"]["pretraining"]["Adam"]["least"])
    starts = f"{rows[0]['runs']} starts" + (f", in {sets} sets of them" if sets > 1 else "")
    middle = "median" if count == FEW else "mean"  # as the paper has it; its ten points have no mean
    yield f"Trained on {count} points, MSE on {POINTS}: the least of {starts}, and the {middle}:"
    yield from ("", "| function | start | Adam | Levenberg-Marquardt | paper |", "|---|---|---:|---:|---:|")
    for row in rows:
        for start, ways in row["errors"].items():
            ours = " | ".join(f"{spread(way['least'])}, {way[middle]:.1e}" for way in ways.values())
            yield f"| {row['function']} | {start} | {ours} | {of_paper(start, row['function'], count)} |"


def spread(numbers: Sequence[float]) -> str:
    """Return the least and the largest, or one number where they read the same."""
    low, high = f"{min(numbers):.1e}", f"{max(numbers):.1e}"
    return low if low == high else f"{low} to {high}"


def of_paper(start: str, function: str, count: int) -> str:
    """Return the paper's figures, where it has any."""
    if count == FEW:
        figure = PAPER_FEW.get(start, {}).get(function)
        return "" if figure is None else f"{figure:.2e}"
    pair = PAPER[start].get(function)
    return "" if pair is None else f"{pair[0]:.2e}, {pair[1]:.2e}"


def schedules_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the order of training makes of ten points."""
    if not rows:
        return
    sets, runs = len(rows[0]["errors"]["to the end"]["Adam"]["least"]), rows[0]["runs"]
    yield ""
    yield (
        f"The least of {runs} starts on {FEW} points depends on how long the peaks are trained, and on how all weights "
        f"are after them: in {sets} sets of starts, with how many of these reach the paper's figure, and the median of "
        f"all {runs * sets}. Here Levenberg-Marquardt sees the {FEW} points alone; from pretraining in the table above "
        "it is `asapc.relu.fit`, which on fewer points than weights fits what lies between them too:"
    )
    yield ""
    yield f"| function | peaks trained | all weights by | least of {runs} | reach | median | paper |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for row in rows:
        for stage, ways in row["errors"].items():
            for way, of_runs in ways.items():
                paper = PAPER_FEW["pretraining"][row["function"]]
                reach = f"{sum(least <= paper for least in of_runs['least'])} of {sets}"
                figures = f"{spread(of_runs['least'])} | {reach} | {of_runs['median']:.1e} | {paper:.2e}"
                yield f"| {row['function']} | {stage} | {way} | {figures} |"


def points_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what other choices of ten points make of the figures, and how close to the paper's they come."""
    if not rows:
        return
    figures = {(row["design"], judge): least for row in rows for judge, least in row["least"]["pretraining"].items()}
    on_many = [pair for pair in figures if pair[1] == f"{POINTS} points"]
    closest = sorted(figures.keys() - on_many, key=lambda pair: furthest(figures[pair]))[:CLOSEST]
    yield ""
    yield (
        f"Other choices of the ten points, measured on {POINTS} and on ten others, by Adam: the least of "
        f"{rows[0]['runs']} starts. Of {len(figures) - len(on_many)} pairs of tens the closest {CLOSEST} are shown. "
        "The last column is the largest ratio of a figure to the paper's, either way up, over the four functions."
    )
    yield ""
    yield "| trained on | measured on | " + " | ".join(FUNCTIONS) + " | off by up to |"
    yield "|---|---|" + "---:|" * (len(FUNCTIONS) + 1)
    for pair in (*on_many, *closest):
        cells = " | ".join(f"{error:.1e}" for error in figures[pair].values())
        yield f"| {pair[0]} | {pair[1]} | {cells} | {furthest(figures[pair]):.1f} |"
    yield "| paper | | " + " | ".join(f"{PAPER_FEW['pretraining'][text]:.1e}" for text in FUNCTIONS) + " | |"


def furthest(figures: Mapping[str, float]) -> float:
    """Return the largest ratio of a figure to the paper's or of the paper's to it."""
    ratios = [figures[text] / PAPER_FEW["pretraining"][text] for text in FUNCTIONS]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def models_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of activations."""
    if not rows:
        return
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
        of_way = {row["width"]: f"{accuracy(row)} | {row['weights']}" for row in rows if row["activation"] == way}
        yield f"| {way} | " + " | ".join(of_way.get(width, " | ") for width in widths) + " |"


def accuracy(row: Row) -> str:
    """Return the mean accuracy in per cent, with the least and the most."""
    low, mean, high = (100 * of(row["accuracies"]) for of in (min, fmean, max))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def draw(rows: Mapping[str, Row], folder: Path) -> None:
    """Draw ten points by order of training, and accuracy on the digits by weights."""
    figure = new_figure((9, 3.6))
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(row for row in rows.values() if row["part"] == "schedule"):
        paper = PAPER_FEW["pretraining"][row["function"]]
        orders = {f"{stage}, {way}": of_runs for stage, ways in row["errors"].items() for way, of_runs in ways.items()}
        for place, of_runs in enumerate(orders.values()):
            ends = [end(of_runs["least"]) / paper for end in (min, max)]
            label = row["function"] if place == 0 else None
            left.plot(ends, [place + 0.18 * (i - 1)] * 2, f"C{i}", linewidth=4, label=label)
            left.plot(of_runs["median"] / paper, place + 0.18 * (i - 1), f"C{i}|")
        left.set_yticks(range(len(orders)), [f"peaks {order}" for order in orders], fontsize=8)
    left.axvline(1, color="black", linestyle=":", linewidth=1)
    left.set(
        ylim=(-0.6, 7),
        xscale="log",
        xlabel="MSE over the paper's: least of 30; median, thin",
        title="ten points, by training",
    )
    left.set_xticks((0.5, 1, 2, 5), labels=("0.5", "1", "2", "5"))
    left.set_xticks([], minor=True)
    models = [row for row in rows.values() if row["part"] == "digits"]
    for way in dict.fromkeys(row["activation"] for row in models):
        of_way = sorted((row for row in models if row["activation"] == way), key=lambda row: row["width"])
        weights, means = zip(*((row["weights"], 100 * fmean(row["accuracies"])) for row in of_way), strict=True)
        right.plot(weights, means, marker="o", markersize=4, label=way)
    ticks = sorted({row["weights"] for row in models if row["activation"] == "ReLU"})
    right.set(xscale="log", xlabel="weights", title="digits, accuracy in %")
    right.set_xticks(ticks, labels=[str(weights) for weights in ticks])
    right.set_xticks([], minor=True)
    for axes, columns, place in ((left, 2, "upper right"), (right, 1, "lower right")):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, ncols=columns, loc=place)
    save(figure, folder / FIGURE)
