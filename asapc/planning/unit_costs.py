"""Fits what a unit of each kind of work takes to the times of whole operators."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls


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
    fitted, _ = nnls((relative / scale).numpy(), np.ones(len(trials)))
    costs = shares @ (torch.from_numpy(fitted) / scale)
    return dict(zip(kinds, costs.tolist(), strict=True)), (units @ costs).tolist()


def median_error(trials: Sequence[Trial], estimates: Sequence[float]) -> float:
    """Return the median of the relative errors of estimates."""
    errors = [abs(e / trial.milliseconds - 1) for trial, e in zip(trials, estimates, strict=True)]
    return torch.tensor(errors, dtype=torch.float64).quantile(0.5).item()
