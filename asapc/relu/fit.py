"""Fits ReLU networks of width 4 with exponentially many pieces to functions of one variable.

The first stage stays on the manifold of `relu.networks`: Adam trains the peaks alone; scale and affine part are linear
and follow from them in closed form at every step (variable projection). It ends when a hundred steps improve the mean
error of the runs by less than a hundredth. Then all weights are free, and Levenberg-Marquardt trains them: there are
about a hundred, and the error is a sum of squares. Fewer samples than weights do not determine the function between
them, and free weights could make it anything: in that case the target is the function on the manifold, plus straight
lines from sample to sample through its residuals. Many functions and many runs are trained side by side.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from asapc.relu.networks import WIDTH, Manifold, ReLUNetworks, sum_of_waves, to_networks, to_peaks

# The first stage ends when PATIENCE steps have gained less than this share of the error.
PATIENCE, MIN_GAIN, MAX_STEPS, RATE = 100, 0.01, 3000, 0.02
DENSE = 500  # points for free weights where samples are few
MIN_SCALE = 1e-9
FREE_STEPS, FIRST_DAMPING, MIN_DAMPING, MAX_DAMPING = 150, 1e-2, 1e-12, 1e12
ROUNDING = 1e-14  # where a unit is inactive everywhere, the normal matrix is zero


class Fitted(NamedTuple):
    """Fitted networks: runs of each function, and members of each run, whose sum is the function.

    Attributes:
        networks: F * R * members networks, in that order.
        errors: (F, R) mean squared errors on the samples.
        members: networks a run.
    """

    networks: ReLUNetworks
    errors: Tensor
    members: int

    def best(self, function: int = 0) -> nn.Sequential:
        """Return the best run of a function, as plain layers."""
        run = int(self.errors[function].nan_to_num(nan=math.inf).argmin())
        first = (function * self.errors.shape[1] + run) * self.members
        return self.networks.layers(*range(first, first + self.members))


def fit(x: Tensor, y: Tensor, depth: int, runs: int = 30, members: int = 1, seed: int = 0, free: bool = True) -> Fitted:
    """Fit networks to samples of functions, on the manifold and, if `free`, beyond.

    Args:
        x: (P,) points, float64, all different.
        y: (F, P) values.
        depth: hidden layers, each of which doubles the pieces.
        runs: independent starts for each function.
        members: networks a run; two represent functions that are neither convex nor concave.
        seed: of the starts.
        free: whether all weights are trained in the end.
    """
    domain = low, high = x.amin().item(), x.amax().item()
    t = (x - low) / (high - low)
    networks = to_networks(fit_manifold(t, y, depth, runs, members, seed), domain)
    if free and x.numel() < members * networks.weights:
        between = torch.linspace(*domain, DENSE, dtype=x.dtype)
        networks = train(networks, between, fill_in(networks, x, y, members, between), members).networks
        free = False
    return train(networks, x, y, members, FREE_STEPS if free else 0)


def fill_in(networks: ReLUNetworks, x: Tensor, y: Tensor, members: int, between: Tensor) -> Tensor:
    """Return values (F * R, Q) between samples: of each run, plus straight lines through its residuals."""
    with torch.no_grad():
        values, filled = (torch.unflatten(networks(points), 0, (-1, members)).sum(dim=1) for points in (x, between))
    residuals = y.repeat_interleave(values.shape[0] // y.shape[0], dim=0) - values
    order = x.argsort()
    lines = np.stack([np.interp(between, x[order], hat) for hat in np.eye(x.numel())])
    return filled + residuals[:, order] @ torch.from_numpy(lines)


def fit_manifold(
    t: Tensor, y: Tensor, depth: int, runs: int, members: int, seed: int, steps: int = MAX_STEPS
) -> Manifold:
    """Take the first stage: peaks by Adam, everything else by least squares.

    Args:
        t: (P,) points in [0, 1], float64, all different.
        y: (F, P) values.
        depth: hidden layers.
        runs: independent starts for each function.
        members: networks a run.
        seed: of the starts.
        steps: at most so many; 0 leaves the peaks where they start.
    """
    groups = y.shape[0] * runs
    target = y.repeat_interleave(runs, dim=0)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups * members, depth + 1, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    optimiser = torch.optim.Adam([logits], RATE)
    best, since = math.inf, 0
    for _ in range(steps):
        peaks = to_peaks(logits)
        waves = torch.unflatten(sum_of_waves(t, peaks), 0, (groups, members))
        coefficients = solve(t, waves.detach(), target)
        values = (coefficients.unsqueeze(1) @ design(t, waves)).squeeze(1)
        errors = (values - target).square().mean(dim=-1)
        optimiser.zero_grad()
        errors.log().sum().backward()  # type: ignore[no-untyped-call] # the logarithm weighs all runs alike
        optimiser.step()
        now = errors.detach().log().mean().item()
        best, since = (now, 0) if now < best + math.log(1 - MIN_GAIN) else (best, since + 1)
        if since == PATIENCE:
            break
    with torch.no_grad():
        peaks = to_peaks(logits)
        coefficients = solve(t, torch.unflatten(sum_of_waves(t, peaks), 0, (groups, members)), target)
        # The affine part goes to the first member of each group.
        affine = torch.zeros(groups, members, 2, dtype=torch.float64)
        affine[:, 0] = coefficients[:, :2]
        scale = -coefficients[:, 2:].flatten()
        scale = torch.where(scale.abs() < MIN_SCALE, MIN_SCALE, scale)
        return Manifold(peaks, scale, affine[..., 1].flatten(), affine[..., 0].flatten())


def design(t: Tensor, waves: Tensor) -> Tensor:
    """Return the functions that are combined linearly: (G, 2 + members, P)."""
    affine = torch.stack([torch.ones_like(t), t]).expand(waves.shape[0], -1, -1)
    return torch.cat([affine, waves], dim=1)


def solve(t: Tensor, waves: Tensor, target: Tensor) -> Tensor:
    """Return the coefficients (G, 2 + members) of least squares."""
    columns = design(t, waves).transpose(-1, -2)
    # Not torch's default, gelsy, whose pivots start from uninitialised memory: with columns of zeros it sometimes errs.
    solution: Tensor = torch.linalg.lstsq(columns, target.unsqueeze(-1), driver="gelsd").solution
    return solution.squeeze(-1)


def random_networks(x: Tensor, functions: int, runs: int, depth: int, seed: int, start: str) -> ReLUNetworks:
    """Initialise networks of the same shape as torch does: "kaiming" or "xavier", both uniform, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    init: Any = {"kaiming": nn.init.kaiming_uniform_, "xavier": nn.init.xavier_uniform_}[start]
    options = {"nonlinearity": "relu"} if start == "kaiming" else {}
    k = functions * runs

    def weights(rows: int, columns: int) -> Tensor:
        empty = [torch.empty(rows, columns, dtype=torch.float64) for _ in range(k)]
        return torch.stack([init(matrix, generator=generator, **options) for matrix in empty])

    hidden = torch.stack([weights(WIDTH, WIDTH) for _ in range(depth - 1)], dim=1) if depth > 1 else None
    return ReLUNetworks(
        weights(WIDTH, 1).squeeze(-1),
        torch.zeros(k, WIDTH, dtype=torch.float64),
        torch.zeros(k, 0, WIDTH, WIDTH, dtype=torch.float64) if hidden is None else hidden,
        torch.zeros(k, depth - 1, WIDTH, dtype=torch.float64),
        torch.cat([weights(1, WIDTH).squeeze(1), torch.zeros(k, 1, dtype=torch.float64)], dim=-1),
    )


def train(networks: ReLUNetworks, x: Tensor, y: Tensor, members: int, steps: int = FREE_STEPS) -> Fitted:
    """Train all weights by Levenberg-Marquardt, all groups side by side; a step that does not help is not taken."""
    shapes = [parameter.shape[1:] for parameter in networks.parameters()]
    sizes = [shape.numel() for shape in shapes]
    flat = torch.cat([p.detach().flatten(1) for p in networks.parameters()], dim=-1)
    groups = flat.shape[0] // members
    target = y.repeat_interleave(groups // y.shape[0], dim=0)

    def at(weights: Tensor) -> ReLUNetworks:
        parts = torch.split(weights.reshape(groups * members, -1), sizes, dim=-1)
        return ReLUNetworks(
            *(part.reshape(groups * members, *shape) for part, shape in zip(parts, shapes, strict=True))
        )

    def add_members(values: Tensor) -> Tensor:
        return torch.unflatten(values, 0, (groups, members)).sum(dim=1)

    flat = flat.reshape(groups, -1)
    damping = torch.full((groups,), FIRST_DAMPING, dtype=flat.dtype)
    with torch.no_grad():
        residuals = target - add_members(at(flat)(x))
        errors = residuals.square().mean(dim=-1)
        for _ in range(steps):
            slopes = at(flat).jacobian(x).reshape(groups, flat.shape[1], -1)
            normal = slopes @ slopes.transpose(-1, -2)
            moment = slopes @ residuals.unsqueeze(-1)
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            ridge = damping.unsqueeze(-1) * diagonal + ROUNDING * diagonal.amax(dim=-1, keepdim=True)
            factor, info = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))
            candidate = flat + torch.cholesky_solve(moment, factor).squeeze(-1)
            trial = target - add_members(at(candidate)(x))
            trial_errors = trial.square().mean(dim=-1)
            better = (trial_errors < errors) & (info == 0)
            flat = torch.where(better.unsqueeze(-1), candidate, flat)
            residuals = torch.where(better.unsqueeze(-1), trial, residuals)
            errors = torch.where(better, trial_errors, errors)
            damping = torch.where(better, damping / 3, damping * 4).clamp(MIN_DAMPING, MAX_DAMPING)
    return Fitted(at(flat), errors.reshape(y.shape[0], -1), members)
