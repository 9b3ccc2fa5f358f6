"""Half-steps of Sinkhorn scaling in the log domain, and the two-sided entropic c-transform that they make up.

Conventions, here and everywhere in asapc: `scores` (B, H, N, M) are in units of the temperature, so that
the plan is exp(scores + f[..., :, None] + g[..., None, :]), with rows that sum to 1 and columns that sum
to N / M. `f` (B, H, N) is the query-side dual, `g` (B, H, M) the key-side one, both in the same units.
"""

import math

import torch


def column_step(scores: torch.Tensor, f: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
    """Return the key-side dual g (B, H, M) for which the columns of the plan sum to `mass`.

    g_j = log(mass_j) - logsumexp_i(scores_ij + f_i): the entropic c-transform of f. Columns of -inf, to which no dual
    can give mass, get 0.

    Args:
        scores: (B, H, N, M).
        f: (B, H, N).
        mass: broadcast to (B, H, M); None for N / M.
    """
    sums = torch.logsumexp(scores + f.unsqueeze(-1), dim=-2)
    log_mass = math.log(scores.shape[-2] / scores.shape[-1]) if mass is None else mass.log()
    return torch.where(sums == -math.inf, 0.0, log_mass - sums)


def row_step(scores: torch.Tensor, g: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
    """Return the query-side dual f (B, H, N) for which the rows of the plan sum to `mass`, by default 1.

    f_i = log(mass_i) - logsumexp_j(scores_ij + g_j): the entropic c-transform of g. Rows of -inf get 0.
    """
    sums = torch.logsumexp(scores + g.unsqueeze(-2), dim=-1)
    return torch.where(sums == -math.inf, 0.0, (0.0 if mass is None else mass.log()) - sums)


def closure(scores: torch.Tensor, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the two-sided entropic c-transform: g = column_step(f), then f = row_step(g).

    ASAP (arXiv 2605.12879) rebuilds the plan from an estimated dual with it. It *is* two Sinkhorn half-steps from a
    warm start: from the dual of half-step T - 2 of a teacher that ends on rows it returns the duals of half-step T
    exactly, and a constant added to f only changes the constant in g.

    Args:
        scores: (B, H, N, M).
        f: (B, H, N).

    Returns:
        f (B, H, N) and g (B, H, M).
    """
    g = column_step(scores, f)
    return row_step(scores, g), g


def plan(scores: torch.Tensor, f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the plan exp(scores + f + g), (B, H, N, M)."""
    return torch.exp(scores + f.unsqueeze(-1) + g.unsqueeze(-2))
