"""Fits ReLU networks of width 4 with exponentially many pieces to functions of one variable.

First on the manifold of `relu.networks`: the peaks alone are trained, by Adam; scale and affine part are linear and
follow from them in closed form at every step (variable projection). The manifold is left where a hundred steps have
improved the mean error of the runs by less than a hundredth. Then all weights are free, and trained by
Levenberg-Marquardt: there are about a hundred of them, and the error is a sum of squares. Where samples are fewer than
weights they do not say what lies between them, and free weights would make anything of it: there the target is what the
manifold made, plus straight lines from sample to sample through what it left off. Many functions and many runs are
trained side by side.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from asapc.relu.networks import WIDTH, Manifold, ReLUNetworks, sum_of_waves, to_networks, to_peaks

# The manifold is left where so many steps have gained less than this share of the error.
PATIENCE, MIN_GAIN, MAX_STEPS, RATE = 100, 0.01, 3000, 0.02
DENSE = 500  # points for free weights where samples are few
MIN_SCALE = 1e-9
FREE_STEPS, FIRST_DAMPING, MIN_DAMPING, MAX_DAMPING = 150, 1e-2, 1e-12, 1e12
ROUNDING = 1e-14  # of a unit that is off everywhere the normal matrix is zero


class Fitted(NamedTuple):
    """Networks that were fitted: runs of each function, and members of each run, whose sum is the function.

    Attributes:
        networks: F * R * members of them, in that order.
        errors: (F, R) mean squared errors on the samples.
        members: networks a function.
    """

    networks: ReLUNetworks
    errors: Tensor
    members: int

    def best(self, function: int = 0) -> nn.Sequential:
        """The best run of a function, as plain layers."""
        run = int(self.errors[function].nan_to_num(nan=math.inf).argmin())
        first = (function * self.errors.shape[1] + run) * self.members
        return self.networks.layers(*range(first, first + self.members))


def fit(x: Tensor, y: Tensor, depth: int, runs: int = 30, members: int = 1, seed: int = 0, free: bool = True) -> Fitted:
    """Fit networks to samples of functions, on the manifold and, unless told otherwise, beyond.

    Args:
        x: (P,) places, float64, all different.
        y: (F, P) values.
        depth: hidden layers, each of which doubles the pieces.
        runs: independent starts for each function.
        members: networks a function; two make functions that are neither convex nor concave.
        seed: of the starts.
        free: whether the manifold is left in the end.
    """
    domain = (x.amin().item(), x.amax().item())
    networks = to_networks(fit_manifold(x, y, depth, runs, members, seed), domain)
    if free and x.numel() < members * networks.weights:
        between = torch.linspace(*domain, DENSE, dtype=x.dtype)
        networks = train(networks, between, fill_in(networks, x, y, members, between), members).networks
        free = False
    return train(networks, x, y, members, FREE_STEPS if free else 0)


def fill_in(networks: ReLUNetworks, x: Tensor, y: Tensor, members: int, between: Tensor) -> Tensor:
    """Values (F * R, Q) at other places: of each run, plus straight lines through what it leaves off the samples."""
    with torch.no_grad():
        made, there = (torch.unflatten(networks(places), 0, (-1, members)).sum(dim=1) for places in (x, between))
    off = y.repeat_interleave(made.shape[0] // y.shape[0], dim=0) - made
    order = x.argsort()
    lines = np.stack([np.interp(between, x[order], hat) for hat in np.eye(x.numel())])
    return there + off[:, order] @ torch.from_numpy(lines)


def fit_manifold(x: Tensor, y: Tensor, depth: int, runs: int, members: int, seed: int) -> Manifold:
    """The first stage: peaks by Adam, all else by least squares."""
    t = (x - x.amin()) / (x.amax() - x.amin())
    groups = y.shape[0] * runs
    target = y.repeat_interleave(runs, dim=0)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups * members, depth + 1, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    optimiser = torch.optim.Adam([logits], RATE)
    best, since = math.inf, 0
    for _ in range(MAX_STEPS):
        peaks = to_peaks(logits)
        waves = torch.unflatten(sum_of_waves(t, peaks), 0, (groups, members))
        coefficients = solve(t, waves.detach(), target)
        made = (coefficients.unsqueeze(1) @ design(t, waves)).squeeze(1)
        errors = (made - target).square().mean(dim=-1)
        optimiser.zero_grad()
        errors.log().sum().backward()  # type: ignore[no-untyped-call] # runs take no notice of each other, whatever their errors
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
    """What a function is a linear combination of: (G, 2 + members, P)."""
    affine = torch.stack([torch.ones_like(t), t]).expand(waves.shape[0], -1, -1)
    return torch.cat([affine, waves], dim=1)


def solve(t: Tensor, waves: Tensor, target: Tensor) -> Tensor:
    """Coefficients (G, 2 + members) of least squares."""
    columns = design(t, waves).transpose(-1, -2)
    found: Tensor = torch.linalg.lstsq(columns, target.unsqueeze(-1)).solution
    return found.squeeze(-1)


def random_networks(x: Tensor, functions: int, runs: int, depth: int, seed: int, start: str) -> ReLUNetworks:
    """Networks of the same shape as torch starts them: "kaiming" or "xavier", both uniform, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    init: Any = {"kaiming": nn.init.kaiming_uniform_, "xavier": nn.init.xavier_uniform_}[start]
    options = {"nonlinearity": "relu"} if start == "kaiming" else {}
    k = functions * runs

    def weights(rows: int, columns: int) -> Tensor:
        made = [init(torch.empty(rows, columns, dtype=torch.float64), generator=generator, **options) for _ in range(k)]
        return torch.stack(made)

    hidden = torch.stack([weights(WIDTH, WIDTH) for _ in range(depth - 1)], dim=1) if depth > 1 else None
    return ReLUNetworks(
        weights(WIDTH, 1).squeeze(-1),
        torch.zeros(k, WIDTH, dtype=torch.float64),
        torch.zeros(k, 0, WIDTH, WIDTH, dtype=torch.float64) if hidden is None else hidden,
        torch.zeros(k, depth - 1, WIDTH, dtype=torch.float64),
        torch.cat([weights(1, WIDTH).squeeze(1), torch.zeros(k, 1, dtype=torch.float64)], dim=-1),
    )


def train(networks: ReLUNetworks, x: Tensor, y: Tensor, members: int, steps: int = FREE_STEPS) -> Fitted:
    """Levenberg-Marquardt on all weights, group by group side by side; a step that does not help is not taken."""
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

    def values(made: Tensor) -> Tensor:
        return torch.unflatten(made, 0, (groups, members)).sum(dim=1)

    flat = flat.reshape(groups, -1)
    damping = torch.full((groups,), FIRST_DAMPING, dtype=flat.dtype)
    with torch.no_grad():
        residuals = target - values(at(flat)(x))
        errors = residuals.square().mean(dim=-1)
        for _ in range(steps):
            slopes = at(flat).jacobian(x).reshape(groups, flat.shape[1], -1)
            normal = slopes @ slopes.transpose(-1, -2)
            moment = slopes @ residuals.unsqueeze(-1)
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            ridge = damping.unsqueeze(-1) * diagonal + ROUNDING * diagonal.amax(dim=-1, keepdim=True)
            factor, info = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))
            candidate = flat + torch.cholesky_solve(moment, factor).squeeze(-1)
            trial = target - values(at(candidate)(x))
            found = trial.square().mean(dim=-1)
            better = (found < errors) & (info == 0)
            flat = torch.where(better.unsqueeze(-1), candidate, flat)
            residuals, errors = torch.where(better.unsqueeze(-1), trial, residuals), torch.where(better, found, errors)
            damping = torch.where(better, damping / 3, damping * 4).clamp(MIN_DAMPING, MAX_DAMPING)
    return Fitted(at(flat), errors.reshape(y.shape[0], -1), members)
