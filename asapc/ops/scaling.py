"""Sinkhorn scaling on the exponentiated scores: one exp, then matrix-vector products.

The kernel is exp(scores) up to a factor per row and a factor per column, chosen so that every row and every
column holds a 1, or is masked, and nothing exceeds 1. A factor is a dual, so it changes no plan; it only keeps
every sum of the first half-steps between 1 and the number of terms, whatever the scores. Scaling vectors are kept
as row vectors, (B, H, 1, N) and (B, H, 1, M): a row vector times a matrix is the product that runtimes do fast.
"""

import torch

# Sums below this are held there. Float32 reaches it only when the scaling vectors span more than 30 orders of
# magnitude; the result is then wrong but finite, and the fidelity check on real samples sees it.
SMALLEST_SUM = 1e-30
# Where a site is masked, scores below this are the mask: -inf, -1e9, -1e4 and their likes.
LOWEST_LIVE = -1e3


def scaling_exponent(scores: torch.Tensor, masked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponent of a kernel for a column step that comes first.

    Args:
        scores: (B, H, N, M), with any query-side dual already added.
        masked: whether to leave out what lies below LOWEST_LIVE: its kernel is 0, also where that is a whole
            row or column.

    Returns:
        exponent (B, H, N, M), not positive, and shift (B, H, 1, N), so that, up to a factor per column,
        exp(scores) = exp(shift) * exp(exponent). A query-side dual f that comes on top of the scores is
        therefore exp(f + shift) as a scaling vector of the kernel exp(exponent).
    """
    most = scores.amax(dim=-2, keepdim=True)
    scores = scores - (most.clamp_min(LOWEST_LIVE) if masked else most)
    shift = scores.amax(dim=-1, keepdim=True)
    if masked:
        shift = shift.clamp_min(LOWEST_LIVE)
    return scores - shift, shift.transpose(-1, -2)


def masked_log_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the last axis that keeps what lies below LOWEST_LIVE out, whole rows of it too."""
    scores = scores - scores.amax(dim=-1, keepdim=True).clamp_min(LOWEST_LIVE)
    return scores - torch.log(torch.exp(scores).sum(dim=-1, keepdim=True).clamp_min(SMALLEST_SUM))


def column_scaling(kernel: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Key-side vector (B, H, 1, M), up to a constant, that makes the columns of u * kernel * v equal in sum."""
    return 1 / (u @ kernel).clamp_min(SMALLEST_SUM)


def row_scaling(kernel: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Query-side vector (B, H, 1, N) that makes the rows of u * kernel * v sum to 1."""
    return 1 / (v @ kernel.transpose(-1, -2)).clamp_min(SMALLEST_SUM)


def row_normalised_output(kernel: torch.Tensor, v: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention output (B, H, N, E) of the plan kernel * v after a row step: the two in one product."""
    v = v.transpose(-1, -2)
    weighted = kernel @ torch.cat([v * values, v], dim=-1)
    return weighted[..., :-1] / weighted[..., -1:].clamp_min(SMALLEST_SUM)
