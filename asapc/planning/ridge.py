"""Fits linear maps from sufficient statistics, in closed form: tensors in, tensors out."""

from math import sqrt

import torch
from torch import Tensor

from asapc.types.choices import Regression

# Relative to the widest feature: all have the units of the scores, so that their spreads compare.
MIN_SPREAD = 1e-6
# Ridge parameters to try. A first map extrapolates from a few features and needs damping. Later maps combine closures
# that are nearly parallel, whose small differences matter.
PENALTIES = tuple(10.0**exponent for exponent in range(-7, 0))


def fit(fitting: Regression, selection: Regression) -> Tensor:
    """Fit weights (H, F) by ridge regression, each head with that of PENALTIES which errs least on other samples.

    Args:
        fitting: statistics of the samples to fit.
        selection: those of the samples that choose.
    """
    solutions = torch.stack([ridge(fitting, penalty) for penalty in PENALTIES])
    errors = torch.stack([residual(selection, weights) for weights in solutions])
    best = errors.argmin(dim=0)
    return solutions[best, torch.arange(best.numel())]


def gain_of_doubling(half: Regression, whole: Regression, selection: Regression, weights: Tensor) -> float:
    """Predict the share of a map's error, all heads together, that twice as many samples would take off.

    The squared error on other samples falls as a + b / n with the number n of samples, and two numbers tell a and b.

    Args:
        half: statistics of some of the samples.
        whole: those of all samples to fit.
        selection: those of the samples that choose.
        weights: (H, F), what `fit` makes of `whole`.
    """
    before, now = (residual(selection, w).sum().item() for w in (fit(half, selection), weights))
    slope = (before - now) / (float(whole.count) / float(half.count) - 1)
    # From two noisy numbers no more than what would halve the squared error is believed.
    share = min(max(slope / 2 / now, 0.0), 0.5) if now > 0 else 0.0
    return 1 - sqrt(1 - share)


def residual(problem: Regression, weights: Tensor) -> Tensor:
    """Sum (H,) the squared errors that weights (H, F) leave."""
    # |t - w.x|^2 summed, multiplied out: the samples themselves are gone.
    quadratic = torch.einsum("hf,hfe,he->h", weights, problem.gram, weights)
    return problem.energy - 2 * (weights * problem.moment).sum(dim=-1) + quadratic


def ridge(problem: Regression, penalty: float) -> Tensor:
    """Return the weights (H, F) that minimise mean (target - weights . features)^2 + penalty * |weights * spread|^2.

    Args:
        problem: sums over the calibration samples; `spread` is the features' standard deviation in them.
        penalty: ridge parameter on features standardised to unit variance. A feature that hardly varies, beside
            the one that varies most, gets weight 0: to divide by a spread of rounding errors would amplify them.
    """
    gram, moment = problem.gram / problem.count, problem.moment / problem.count
    spread = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(spread > MIN_SPREAD * spread.amax(dim=-1, keepdim=True), 1 / spread, 0.0)
    correlation = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    regularised = correlation + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype)
    # Cholesky, not solve: batched LU is broken in some CPU builds of torch 2.13 (oneMKL DLASWP).
    factor = torch.linalg.cholesky(regularised)
    solution = torch.cholesky_solve((moment * inverse).unsqueeze(-1), factor)
    return solution.squeeze(-1) * inverse
