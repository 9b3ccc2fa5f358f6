"""Approximates a function of one variable by a ReLU network, beside rivals of as many weights or pieces.

`relu.fit` fits, `relu.networks` defines the networks.
"""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.capturing.export import export
from asapc.errors import OptionError
from asapc.pictures import new_figure, save
from asapc.relu.fit import Fitted, fit, random_networks, train
from asapc.relu.networks import count_pieces
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.version import __version__

FUNCTIONS = {
    name: getattr(torch, name)
    for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt", "abs")
} | {"erf": torch.erf, "relu": torch.relu, "sigmoid": torch.sigmoid, "gelu": nn.functional.gelu}
CONSTANTS = {"pi": math.pi, "e": math.e}
MAX_LENGTH = 1000  # characters of an expression
OPERATIONS: dict[type, Callable[..., Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.Pow: torch.pow,
    ast.USub: torch.neg,
    ast.UAdd: torch.positive,
}
MAX_NETWORK_DEPTH, MIN_POINTS, MAX_POINTS, MAX_RUNS = 10, 8, 100_000, 1000
# A function is convex or concave where its second differences have one sign, up to this share of the largest.
STRAIGHT = 1e-9


@dataclass(frozen=True, eq=False)
class Row:
    """The result of one method to approximate a function.

    Attributes:
        name: the method.
        pieces: linear pieces; None where it has none.
        mse: mean squared error on the points, of the best run.
        largest: largest error on the points, of the best run.
        mean_mse: mean over the runs; None where there is only one.
    """

    name: str
    pieces: int | None
    mse: float
    largest: float
    mean_mse: float | None


@dataclass(frozen=True, eq=False)
class Approximation:
    """A network and its rivals.

    Attributes:
        network: plain layers of width 4, or 8 for two networks side by side, (P, 1) to (P, 1), float64.
        rows: by depth on and off the manifold, then the rivals at full depth.
        x, y: (P,) the points, and the function's values there.
    """

    network: nn.Sequential
    rows: tuple[Row, ...]
    x: Tensor
    y: Tensor

    def data(self) -> dict[str, Any]:
        """Return the rows in plain types."""
        return {"schema": "asapc.approx/1", "rows": [vars(row) for row in self.rows]}


def parse_function(text: str) -> Callable[[Tensor], Tensor]:
    """Parse a function of x in Python's notation, such as "x**3" or "tanh(3*x)": numbers, + - * / ** and FUNCTIONS.

    Raises:
        OptionError: it is something else, or holds anything else.
    """
    hint = f"use x, numbers, pi, e, + - * / ** and {', '.join(FUNCTIONS)}"
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} characters")
        tree = ast.parse(text.strip(), mode="eval").body
        compute(tree, torch.ones(1, dtype=torch.float64))
    except (SyntaxError, ValueError, RecursionError, MemoryError, KeyError, TypeError) as error:
        raise OptionError(f"cannot read the function {text[:200]!r}: {error}", hint) from None
    return lambda x: compute(tree, x).expand_as(x)


def compute(node: ast.expr, x: Tensor) -> Tensor:
    """Evaluate an expression at points x; numbers are floats from the start, so that no power of integers explodes."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return torch.tensor(float(value), dtype=x.dtype)
        case ast.Name(id="x"):
            return x
        case ast.Name(id=name) if name in CONSTANTS:
            return torch.tensor(CONSTANTS[name], dtype=x.dtype)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](compute(left, x), compute(right, x))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](compute(operand, x))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            values: Tensor = FUNCTIONS[name](compute(argument, x))
            return values
    raise ValueError(f"{ast.unparse(node)[:80]!r} is not allowed in it")


def approximate(
    function: Callable[[Tensor], Tensor] | str,
    depth: int = 5,
    domain: tuple[float, float] = (0.0, 1.0),
    points: int = 500,
    runs: int = 30,
    seed: int = 0,
) -> Approximation:
    """Approximate a function on an interval, at every depth up to `depth`.

    Args:
        function: of float64 points (P,), or an expression, see `parse_function`. For samples, pass an interpolation of
            numpy's or scipy's.
        depth: hidden layers; the network has 2^depth pieces on the manifold.
        domain: the interval.
        points: number of equally spaced points, on which errors are measured too.
        runs: independent starts, for the rivals too.
        seed: of the starts.

    Raises:
        OptionError: the function cannot be read or is not finite on the interval, or an option is out of range.
    """
    for name, value, low, high in (
        ("depth", depth, 1, MAX_NETWORK_DEPTH),
        ("points", points, MIN_POINTS, MAX_POINTS),
        ("runs", runs, 1, MAX_RUNS),
    ):
        if not low <= value <= high:
            raise OptionError(f"{name} is {value}", f"give {name} a value from {low} to {high}")
    if not (math.isfinite(domain[0]) and math.isfinite(domain[1]) and domain[0] < domain[1]):
        raise OptionError(f"the domain {domain[0]:g},{domain[1]:g} is not an interval", "give it as LOW,HIGH")
    x = torch.linspace(*domain, points, dtype=torch.float64)
    y = (parse_function(function) if isinstance(function, str) else function)(x)
    if not bool(y.isfinite().all()):
        where = x[~y.isfinite()][0].item()
        raise OptionError(f"the function is not finite at x = {where:.6g}", "give another --domain")
    members = 1 if bends_one_way(y) else 2
    rows = []
    for layers in range(1, depth + 1):
        for name, free in (("compelled", False), ("compelled, then free", True)):
            networks = fit(x, y.unsqueeze(0), layers, runs, members, seed, free)
            rows.append(of_networks(f"{name}, depth {layers}", networks, x, y))
    network = networks.best()
    for start in ("kaiming", "xavier"):
        rival = train(random_networks(x, 1, runs * members, depth, seed, start), x, y.unsqueeze(0), members)
        rows.append(of_networks(f"{start}, free, depth {depth}", rival, x, y))
    pieces = members * 2**depth
    best = np.interp(x.numpy(), *best_pieces(x.numpy(), y.numpy(), pieces))
    rows.append(of_values(f"best {pieces} pieces", pieces, best, y))
    rows.append(of_values(f"cubic spline of {pieces} pieces", None, cubic_spline(x.numpy(), y.numpy(), pieces), y))
    return Approximation(network, tuple(rows), x, y)


def parse_interval(text: str) -> tuple[float, float]:
    """Parse an interval, such as "0,1" or "-1.5,2".

    Raises:
        OptionError: it has another form.
    """
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise OptionError(f"cannot read the domain {text[:200]!r}", "give it as LOW,HIGH, such as 0,1") from None
    return low, high


def bends_one_way(y: Tensor) -> bool:
    """Return whether equally spaced values are those of a convex function, or of a concave one."""
    bends = y[2:] - 2 * y[1:-1] + y[:-2]
    least = STRAIGHT * y.abs().amax()
    return bool((bends > -least).all() or (bends < least).all())


def of_networks(name: str, networks: Fitted, x: Tensor, y: Tensor) -> Row:
    """Return the row of networks fitted to one function."""
    best = networks.best()
    with torch.no_grad():
        largest = (best(x.unsqueeze(-1)).squeeze(-1) - y).abs().amax().item()
    pieces = count_pieces(best, (x[0].item(), x[-1].item()))
    return Row(name, pieces, networks.errors.amin().item(), largest, networks.errors.mean().item())


def of_values(name: str, pieces: int | None, values: np.ndarray, y: Tensor) -> Row:
    """Return the row of an approximation with known values."""
    errors = torch.from_numpy(values) - y
    return Row(name, pieces, errors.square().mean().item(), errors.abs().amax().item(), None)


def best_pieces(x: np.ndarray, y: np.ndarray, pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the knots of a nearly optimal continuous function of `pieces` linear pieces, and its values there.

    Knots divide the integral of |f''|^(2/5) into equal parts, which is optimal for many pieces; the values are those of
    least squares. (de Boor, A Practical Guide to Splines, chapter XII.)
    """
    curvature = np.abs(np.gradient(np.gradient(y, x), x)) ** 0.4
    density = curvature + 1e-3 * curvature.max() + 1e-300
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    knots = np.interp(np.linspace(0, total[-1], pieces + 1), total, x)
    hats = np.stack([np.interp(x, knots, row) for row in np.eye(pieces + 1)], axis=-1)
    return knots, np.linalg.lstsq(hats, y, rcond=None)[0]


def cubic_spline(x: np.ndarray, y: np.ndarray, pieces: int) -> np.ndarray:
    """Evaluate the cubic spline through equally spaced knots."""
    from scipy.interpolate import CubicSpline  # takes a second to import

    knots = np.linspace(x[0], x[-1], min(pieces, len(x) - 1) + 1)
    values: np.ndarray = CubicSpline(knots, np.interp(knots, x, y))(x)
    return values


def save_onnx(approximation: Approximation, path: Path) -> None:
    """Write the network as Gemm and Relu in float32, with one input (P, 1)."""
    inputs = {"input": approximation.x[:2].float().unsqueeze(-1)}
    network = nn.Sequential(*approximation.network).float().eval()
    export_onnx(CapturedGraph(export(network, inputs), Samples(inputs)), path, {"asapc.version": __version__})


def save_plot(approximation: Approximation, path: Path, title: str) -> None:
    """Draw the function, the network and the error."""
    figure = new_figure()
    with torch.no_grad():
        values = approximation.network.double()(approximation.x.unsqueeze(-1)).squeeze(-1)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    top.plot(approximation.x, approximation.y, label=title, linewidth=3, alpha=0.4)
    top.plot(approximation.x, values, label="network", linewidth=1)
    top.legend()
    bottom.plot(approximation.x, values - approximation.y, linewidth=0.8)
    bottom.axhline(0, color="grey", linewidth=0.5)
    bottom.set(xlabel="x", ylabel="error")
    save(figure, path)
