"""What ReLU networks with 2^d pieces make of functions of one variable, beside ordinary starts and the best there is.

    python -m benchmarks.relu            # a minute
    python -m benchmarks.relu --render

The square without any training; x^3 and x^11 on 500 points, and four functions on 10 points, in the shape of the paper
(arXiv 2311.18022: width 4, 5 layers, 30 starts). All starts are trained by the same method; what follows from ten
points is judged on 500. Writes benchmarks/results/relu.json, docs/relu.png, and what stands in docs/relu.md between the
markers.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from asapc.approx import best_pieces, parse_function
from asapc.environment import environment
from asapc.ops.relu_pwl import Manifold, breakpoints, count_pieces, to_networks
from asapc.output import write_json
from asapc.relu_fit import Fitted, fit, random_networks, train
from benchmarks.generated import replace_generated

ROOT = Path(__file__).resolve().parent
RESULTS, DOCUMENT, FIGURE = (
    ROOT / "results" / "relu.json",
    ROOT.parent / "docs" / "relu.md",
    ROOT.parent / "docs" / "relu.png",
)
DEPTH, RUNS, SEED, POINTS, FEW = 5, 30, 0, 500, 10
DEEPEST = 12
# Best rows of the paper's tables: on 500 points the least and the mean, on 10 the least; its Kaiming rows beside them.
PAPER = {"x**3": (7.86e-8, 5.27e-7), "x**11": (8.86e-7, 7.87e-6)}
PAPER_KAIMING = {"x**3": (2.11e-5, 7.20e-2), "x**11": (2.19e-5, 2.82e-2)}
PAPER_FEW = {"x**3": 5.65e-6, "x**11": 6.53e-4, "sin(x)": 7.92e-7, "tanh(3*x)": 5.09e-6}
Row = dict[str, Any]


def main() -> None:
    """Study, write the JSON, draw the figure, render the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="render figure and document only")
    if parser.parse_args().render:
        data: Row = json.loads(RESULTS.read_text())
    else:
        data = {"squares": list(squares()), "functions": list(functions()), "few": list(few_points())}
        write_json(RESULTS, {**data, "environment": environment(SEED)})
    draw(data)
    replace_generated(DOCUMENT, document(data))


def squares() -> Iterator[Row]:
    """The largest error of the construction for x^2, from its breakpoints."""
    one = torch.ones(1, dtype=torch.float64)
    for depth in range(1, DEEPEST + 1):
        peaks = torch.full((1, depth + 1), 0.5, dtype=torch.float64)
        network = to_networks(Manifold(peaks, one / 4, one, 0 * one)).layers(0)
        x, y = breakpoints(network, (0.0, 1.0))
        middle = (x[:-1] + x[1:]) / 2  # where a chord is furthest from a parabola
        worst = ((y[:-1] + y[1:]) / 2 - middle**2).abs().amax().item()
        yield {"depth": depth, "pieces": count_pieces(network), "largest": worst, "bound": 2.0 ** (-2 * depth - 2)}


def functions() -> Iterator[Row]:
    """Fits on many points, from every start."""
    x = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    for text in PAPER:
        y = parse_function(text)(x).unsqueeze(0)
        limit = np.interp(x.numpy(), *best_pieces(x.numpy(), y[0].numpy(), 2**DEPTH))
        row: Row = {"function": text, "best pieces": ((limit - y[0].numpy()) ** 2).mean().item()}
        for name, found in starts(x, y).items():
            row[name] = {
                "least": found.errors.amin().item(),
                "mean": found.errors.mean().item(),
                "largest": found.errors.amax().item(),
                "pieces": count_pieces(found.best()),
            }
        print(row, flush=True)
        yield row


def few_points() -> Iterator[Row]:
    """Fits on ten points, judged on many."""
    x, dense = (torch.linspace(0, 1, count, dtype=torch.float64) for count in (FEW, POINTS))
    for text in PAPER_FEW:
        function = parse_function(text)
        row: Row = {"function": text}
        for name, found in starts(x, function(x).unsqueeze(0)).items():
            with torch.no_grad():
                errors = (found.networks(dense) - function(dense)).square().mean(dim=-1)
            row[name] = {"least": errors.amin().item(), "mean": errors.mean().item()}
        print(row, flush=True)
        yield row


def starts(x: Tensor, y: Tensor) -> dict[str, Fitted]:
    """Fits to one function from every start."""
    found = {
        "compelled": fit(x, y, DEPTH, RUNS, seed=SEED, free=False),
        "compelled, then free": fit(x, y, DEPTH, RUNS, seed=SEED),
    }
    for start in ("kaiming", "xavier"):
        found[start] = train(random_networks(x, 1, RUNS, DEPTH, SEED, start), x, y, 1)
    return found


def draw(data: Row) -> None:
    """The square by depth, and all starts by function."""
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
    """The tables."""
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
        rest = [f"{row['best pieces']:.2e}", pair(*PAPER[text]), pair(*PAPER_KAIMING[text])]
        yield f"| {text} | " + " | ".join([*cells, *rest]) + " |"
    yield ""
    yield "Fitted to 10 points, MSE on 500, least and mean of 30 starts:"
    yield ""
    yield "| function | " + " | ".join(names) + " | paper, least |"
    yield "|" + "---|" * (len(names) + 2)
    for row in data["few"]:
        cells = [pair(row[name]["least"], row[name]["mean"]) for name in names]
        yield f"| {row['function']} | " + " | ".join([*cells, f"{PAPER_FEW[row['function']]:.2e}"]) + " |"


def pair(least: float, mean: float) -> str:
    """Two errors in one cell."""
    return f"{least:.2e}, {mean:.2e}"


if __name__ == "__main__":
    main()
