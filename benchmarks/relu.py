"""What ReLU networks with 2^d pieces make of functions of one variable, beside ordinary starts and the best there is.

    python -m benchmarks.relu            # five minutes
    python -m benchmarks.relu --render

The square without any training; x^3 and x^11 on 500 points, and four functions on 10 points, in the shape of the paper
(arXiv 2311.18022: width 4, 5 layers, 30 starts). All starts are trained by the same method. What follows from ten
points is judged on 500, in six sets of 30 starts, since the least of 30 is a matter of luck there; beside it, what
becomes of compelled networks where free weights have nothing but the ten points. Trained activations, in a network of
two inputs and two hidden layers, beside ReLU and GELU. Writes benchmarks/results/relu.json, docs/relu.png, and what
stands in docs/relu.md between the markers.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from asapc.relu.approx import best_pieces, parse_function
from asapc.relu.fit import Fitted, fit, fit_manifold, random_networks, train
from asapc.relu.networks import Manifold, breakpoints, count_pieces, to_networks
from asapc.relu.trained import TrainedActivation
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.generated import replace_generated

ROOT = Path(__file__).resolve().parent
RESULTS, DOCUMENT, FIGURE = (
    ROOT / "results" / "relu.json",
    ROOT.parent / "docs" / "relu.md",
    ROOT.parent / "docs" / "relu.png",
)
DEPTH, RUNS, SEED, POINTS, FEW, SETS = 5, 30, 0, 500, 10, 6
DEEPEST = 12
HIDDEN, ACTIVATION_DEPTH, ACTIVATION_SEEDS, ACTIVATION_STEPS, ACTIVATION_RATE = 16, 4, range(5), 3000, 5e-3
# The paper's tables, by start: on 500 points the least and the mean of 30 starts, on 10 points the least.
PAPER = {
    "Kaiming": {"x**3": (2.11e-5, 7.20e-2), "x**11": (2.19e-5, 2.82e-2)},
    "construction": {"x**3": (7.63e-7, 3.89e-5), "x**11": (1.86e-5, 3.56e-4)},
    "pretraining": {"x**3": (7.86e-8, 5.27e-7), "x**11": (8.86e-7, 7.87e-6)},
}
PAPER_FEW = {
    "Kaiming": {"x**3": 2.41e-4, "x**11": 2.14e-3, "sin(x)": 2.27e-5, "tanh(3*x)": 1.60e-4},
    "pretraining": {"x**3": 5.65e-6, "x**11": 6.53e-4, "sin(x)": 7.92e-7, "tanh(3*x)": 5.09e-6},
}
FREED = "compelled, then free"
# How many times as wide a network is with each activation, and the activation of so many channels.
WAYS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "ReLU": (1, lambda width: nn.ReLU()),
    "ReLU, twice as wide": (2, lambda width: nn.ReLU()),
    "GELU": (1, lambda width: nn.GELU()),
    "compelled": (1, lambda width: TrainedActivation(width, ACTIVATION_DEPTH)),
    FREED: (1, lambda width: TrainedActivation(width, ACTIVATION_DEPTH)),
}
Row = dict[str, Any]


def main() -> None:
    """Study, write the JSON, draw the figure, render the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="render figure and document only")
    if parser.parse_args().render:
        data: Row = json.loads(RESULTS.read_text())
    else:
        studies = {"squares": squares, "functions": functions, "few": few_points, "activations": activations}
        data = {name: list(study()) for name, study in studies.items()}
        write_json(RESULTS, {**data, "environment": environment(SEED)})
    draw(data)
    replace_generated(DOCUMENT, document(data))


def squares() -> Iterator[Row]:
    """Yield the largest error of the construction for x^2, from its breakpoints."""
    one = torch.ones(1, dtype=torch.float64)
    for depth in range(1, DEEPEST + 1):
        peaks = torch.full((1, depth + 1), 0.5, dtype=torch.float64)
        network = to_networks(Manifold(peaks, one / 4, one, 0 * one)).layers(0)
        x, y = breakpoints(network, (0.0, 1.0))
        middle = (x[:-1] + x[1:]) / 2  # where a chord is furthest from a parabola
        worst = ((y[:-1] + y[1:]) / 2 - middle**2).abs().amax().item()
        yield {"depth": depth, "pieces": count_pieces(network), "largest": worst, "bound": 2.0 ** (-2 * depth - 2)}


def functions() -> Iterator[Row]:
    """Yield fits on many points, from every start."""
    x = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    for text in PAPER["pretraining"]:
        y = parse_function(text)(x).unsqueeze(0)
        limit = np.interp(x.numpy(), *best_pieces(x.numpy(), y[0].numpy(), 2**DEPTH))
        row: Row = {"function": text, "best pieces": ((limit - y[0].numpy()) ** 2).mean().item()}
        for name, fits in starts(x, y).items():
            row[name] = {
                "least": fits.errors.amin().item(),
                "mean": fits.errors.mean().item(),
                "largest": fits.errors.amax().item(),
                "pieces": count_pieces(fits.best()),
            }
        print(row, flush=True)
        yield row


def few_points() -> Iterator[Row]:
    """Yield fits on ten points, judged on many."""
    x, dense = (torch.linspace(0, 1, count, dtype=torch.float64) for count in (FEW, POINTS))
    for text in PAPER_FEW["pretraining"]:
        function = parse_function(text)
        y = function(x).unsqueeze(0)
        row: Row = {"function": text}
        fits = starts(x, y, RUNS * SETS)
        compelled = to_networks(fit_manifold(x, y, DEPTH, RUNS * SETS, 1, SEED))
        fits["compelled, then free on ten points alone"] = train(compelled, x, y, 1)
        for name, fitted in fits.items():
            with torch.no_grad():
                errors = (fitted.networks(dense) - function(dense)).square().mean(dim=-1)
            row[name] = {"least": errors.reshape(SETS, RUNS).amin(dim=1).tolist(), "mean": errors.mean().item()}
        print(row, flush=True)
        yield row


def starts(x: Tensor, y: Tensor, runs: int = RUNS) -> dict[str, Fitted]:
    """Return fits to one function from every start."""
    fits = {
        "compelled": fit(x, y, DEPTH, runs, seed=SEED, free=False),
        FREED: fit(x, y, DEPTH, runs, seed=SEED),
    }
    for start in ("kaiming", "xavier"):
        fits[start] = train(random_networks(x, 1, runs, DEPTH, SEED, start), x, y, 1)
    return fits


def surface(x: Tensor) -> Tensor:
    """Return a smooth function of two variables, (P, 2) to (P, 1)."""
    a, b = x.split(1, dim=-1)
    return torch.sin(3 * a + b) * torch.exp(b / 2) + a * b


def surface_error(network: nn.Module, x: Tensor) -> Tensor:
    """Return the mean squared error of a network at points (P, 2)."""
    return (network(x) - surface(x)).square().mean()


def activations() -> Iterator[Row]:
    """Yield the errors of small networks with several activations, on a function of two variables."""
    for way in WAYS:
        errors = []
        for seed in ACTIVATION_SEEDS:
            torch.manual_seed(seed)
            x, held_out = 4 * torch.rand(1024, 2) - 2, 4 * torch.rand(4096, 2) - 2
            network = fit_perceptron(way, (2, HIDDEN, 1), partial(surface_error, x=x), ACTIVATION_STEPS)
            with torch.no_grad():
                errors.append(surface_error(network, held_out).item())
        row = {"way": way, "weights": sum(p.numel() for p in network.parameters()), "errors": errors}
        print(row, flush=True)
        yield row


def fit_perceptron(
    way: str, sizes: tuple[int, int, int], loss: Callable[[nn.Module], Tensor], steps: int
) -> nn.Sequential:
    """Train a network of two hidden layers.

    Args:
        way: its activation, of WAYS.
        sizes: its inputs, units of each hidden layer, and outputs.
        loss: of a network.
        steps: of training.
    """
    factor, activation = WAYS[way]
    inputs, width, outputs = sizes[0], factor * sizes[1], sizes[2]
    first, last = nn.Linear(inputs, width), nn.Linear(width, outputs)
    network = nn.Sequential(first, activation(width), nn.Linear(width, width), activation(width), last)
    stages = 2 if way == FREED else 1
    for stage in range(stages):
        if stage:
            for module in network.modules():
                if isinstance(module, TrainedActivation):
                    module.free()
        descend(network.parameters(), lambda: loss(network), steps // stages, ACTIVATION_RATE)
    return network


def descend(parameters: Iterable[Tensor], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """Run Adam, its rate falling to nothing."""
    optimiser = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()


def draw(data: Row) -> None:
    """Draw the square by depth, and all starts by function."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy([r["depth"] for r in data["squares"]], [r["largest"] for r in data["squares"]], "o-")
    left.set(xlabel="hidden layers of width 4", ylabel="largest error", title="$x^2$, no training")
    for i, row in enumerate(data["functions"]):
        names = [name for name in row if isinstance(row[name], dict)]
        for at, name in enumerate(names):
            place = at + 0.25 * i
            right.plot([place, place], [row[name]["least"], row[name]["mean"]], f"C{i}", linewidth=4, alpha=0.4)
            right.plot(place, row[name]["least"], f"C{i}o", label=row["function"] if at == 0 else None)
        right.axhline(row["best pieces"], color=f"C{i}", linestyle=":", linewidth=1)
    right.set_yscale("log")
    right.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    right.set(ylabel="MSE, least to mean of 30", title="dotted: best 32 pieces")
    right.legend()
    figure.savefig(FIGURE, dpi=120)


def document(data: Row) -> Iterator[str]:
    """Yield the tables."""
    yield "| hidden layers | pieces | largest error for x^2 | bound 2^(-2d-2) |"
    yield "|---|---|---|---|"
    for row in data["squares"]:
        yield f"| {row['depth']} | {row['pieces']} | {row['largest']:.2e} | {row['bound']:.2e} |"
    yield ""
    yield "MSE on 500 points of [0, 1], least and mean of 30 starts:"
    yield ""
    names = [name for name in data["functions"][0] if isinstance(data["functions"][0][name], dict)]
    yield "| function | " + " | ".join(names) + " | best 32 pieces | paper, best rows | paper, Kaiming |"
    yield "|" + "---|" * (len(names) + 4)
    for row in data["functions"]:
        text = row["function"]
        cells = [pair(row[name]["least"], row[name]["mean"]) for name in names]
        paper = [pair(*PAPER[start][text]) for start in ("pretraining", "Kaiming")]
        yield f"| {text} | " + " | ".join([*cells, f"{row['best pieces']:.2e}", *paper]) + " |"
    yield ""
    yield f"Fitted to {FEW} points, MSE on {POINTS}: the least of {RUNS} starts, in {SETS} sets of them, and the mean:"
    yield ""
    names = [name for name in data["few"][0] if isinstance(data["few"][0][name], dict)]
    yield "| function | " + " | ".join(names) + " | paper, least |"
    yield "|" + "---|" * (len(names) + 2)
    for row in data["few"]:
        cells = [f"{min(r['least']):.1e} to {max(r['least']):.1e}, {r['mean']:.2e}" for r in (row[n] for n in names)]
        yield (
            f"| {row['function']} | " + " | ".join([*cells, f"{PAPER_FEW['pretraining'][row['function']]:.2e}"]) + " |"
        )
    yield ""
    yield f"A function of two variables, by two layers of {HIDDEN}; MSE elsewhere, of {len(ACTIVATION_SEEDS)} seeds:"
    yield ""
    yield "| activation | weights | least | median | largest |"
    yield "|---|---|---|---|---|"
    for row in data["activations"]:
        errors = row["errors"]
        yield f"| {row['way']} | {row['weights']} | {min(errors):.1e} | {median(errors):.1e} | {max(errors):.1e} |"


def pair(least: float, mean: float) -> str:
    """Format two errors in one cell."""
    return f"{least:.2e}, {mean:.2e}"


if __name__ == "__main__":
    main()
