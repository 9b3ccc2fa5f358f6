"""Fits what a unit of each kind of work takes to the times of whole operators."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A column whose gradient is below this, relative to the target, would not bring the estimates closer.
TOLERANCE = 1e-10


class Trial(NamedTuple):
    """An operator that was timed: units of work by their kind, and milliseconds a call."""

    work: Mapping[str, float]
    milliseconds: float


class Binding(NamedTuple):
    """The cost of a kind of work that trials cannot tell: `factor` times that of another kind.

    `why` stands in the file of costs.
    """

    kind: str
    factor: float
    why: str


def fit_costs(
    trials: Sequence[Trial], bindings: Mapping[str, Binding] | None = None
) -> tuple[dict[str, float], list[float]]:
    """Fit non-negative milliseconds a unit by least squares on relative errors.

    Args:
        trials: the operators.
        bindings: by kinds of work that are not fitted themselves. A kind that others are bound to may be bound too.

    Returns:
        Milliseconds by kind, and the estimate of each trial.
    """
    bindings = bindings or {}
    kinds = sorted({kind for trial in trials for kind in trial.work} | bindings.keys())
    units = torch.tensor([[trial.work.get(kind, 0.0) for kind in kinds] for trial in trials], dtype=torch.float64)
    times = torch.tensor([trial.milliseconds for trial in trials], dtype=torch.float64)
    free = [kind for kind in kinds if kind not in bindings]
    shares = torch.zeros(len(kinds), len(free), dtype=torch.float64)  # the cost of each kind by those that are fitted
    for row, kind in zip(shares, kinds, strict=True):
        factor = 1.0
        while kind in bindings:
            factor, kind = factor * bindings[kind].factor, bindings[kind].kind
        row[free.index(kind)] = factor
    relative = units @ shares / times.unsqueeze(-1)
    scale = relative.amax(dim=0).clamp(min=torch.finfo(torch.float64).tiny)  # units differ by many orders of magnitude
    costs = shares @ (nonnegative_least_squares(relative / scale, torch.ones_like(times)) / scale)
    return dict(zip(kinds, costs.tolist(), strict=True)), (units @ costs).tolist()


def median_error(trials: Sequence[Trial], estimates: Sequence[float]) -> float:
    """Return the median of the relative errors of estimates."""
    errors = [abs(e / trial.milliseconds - 1) for trial, e in zip(trials, estimates, strict=True)]
    return torch.tensor(errors, dtype=torch.float64).quantile(0.5).item()


def nonnegative_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """Return x (N,) >= 0 that minimises |matrix @ x - target|, by the active set method of Lawson and Hanson (1974).

    scipy has it, and is not among what asapc needs.
    """
    x = torch.zeros(matrix.shape[-1], dtype=matrix.dtype)
    positive = torch.zeros_like(x, dtype=torch.bool)
    for _ in range(3 * len(x)):  # it mostly ends after as many rounds as there are columns
        gradient = torch.where(positive, -torch.inf, matrix.mT @ (target - matrix @ x))
        if gradient.max() <= TOLERANCE * target.norm():
            break
        positive[gradient.argmax()] = True
        solution = on_columns(matrix, target, positive)
        while (blocked := positive & (solution <= 0)).any():
            step = (x[blocked] / (x[blocked] - solution[blocked])).min()
            x = x + step * (solution - x)
            positive &= x > TOLERANCE * x.max()
            x = torch.where(positive, x, 0.0)
            solution = on_columns(matrix, target, positive)
        x = solution
    return x


def on_columns(matrix: Tensor, target: Tensor, columns: Tensor) -> Tensor:
    """Return the least squares solution that is zero but for some columns."""
    solution = torch.zeros(len(columns), dtype=matrix.dtype)
    solution[columns] = torch.linalg.lstsq(matrix[:, columns], target.unsqueeze(-1), driver="gelsd").solution.squeeze(
        -1
    )
    return solution
