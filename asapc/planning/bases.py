"""Balanced bases of queries and keys, from streamed covariances."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from asapc.ops.features import live_mask, mean
from asapc.planning.activations import Activations
from asapc.planning.distributed import total
from asapc.types.site import Site

# Added to the covariances, relative to their mean variance, so that constant or dependent coordinates
# leave them positive definite.
COVARIANCE_RIDGE = 1e-6
# Coordinates that a dual is estimated from, unless slices need more: the first carry most of the score. All of a head's
# 16 lowered errors by 0 to 8 %, all of 64 raised them by up to a quarter, for two to eight times the work
# (docs/method.md).
COORDINATES = 8


def balanced_bases(sites: Sequence[Site], activations: Iterator[Activations]) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute bases (H, D, D) of queries and keys by the site's name, from streamed activations."""
    scatters: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in activations:
        for site in sites:
            scores, queries, keys = batch[site.name]
            live_queries, live_keys = live_mask(scores) if site.loop.masked else (None, None)
            of_queries, of_keys = scatter(queries, live_queries), scatter(keys, live_keys)
            if site.name in scatters:
                of_queries, of_keys = scatters[site.name][0] + of_queries, scatters[site.name][1] + of_keys
            scatters[site.name] = of_queries, of_keys
    scales = {site.name: site.wiring.product.score_scale for site in sites if site.wiring.product is not None}
    return {name: balance(total(q), total(k), scales[name]) for name, (q, k) in scatters.items()}


def scatter(points: Tensor, live: Tensor | None = None) -> Tensor:
    """Sum the within-sample covariance of live points over the samples: (B, H, N, D) to (H, D, D)."""
    points = points.transpose(-1, -2)
    weights = points.new_ones(1, 1, 1, points.shape[-1]) if live is None else live
    centred = (points - mean(points, live)) * weights
    return torch.einsum("bhdn,bhen->hde", centred / weights.sum(dim=-1, keepdim=True).clamp_min(1), centred)


def balance(query_scatter: Tensor, key_scatter: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Find bases in which queries and keys have the same diagonal covariance and the score is kept.

    With C_q = R R^T, C_k = L L^T and R^T L = U s V^T the bases are R^-T U s^1/2 and L^-T V s^1/2: their
    product is the identity, so that (q @ query_basis).(k @ key_basis) = scale * q.k, and both sides
    have covariance s. The score is then a sum of one-dimensional products, sorted by how much each
    carries: slices along the first directions say most. New with asapc, see docs/method.md.

    Args:
        query_scatter: C_q (H, D, D), positive semi-definite, up to a factor.
        key_scatter: C_k (H, D, D), up to the same factor.
        scale: (H,) factor from q.k to scores, positive.

    Returns:
        Two (H, D, D), directions in the columns.
    """

    def factor(scatter: Tensor) -> Tensor:
        variance = scatter.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        variance = torch.where(variance > 0, variance, 1.0)  # constant points: any basis will do
        eye = torch.eye(scatter.shape[-1], dtype=scatter.dtype)
        lower: Tensor = torch.linalg.cholesky(scatter + COVARIANCE_RIDGE * variance[:, None, None] * eye)
        return lower

    query_factor, key_factor = factor(query_scatter), factor(key_scatter)
    u, s, vt = torch.linalg.svd(query_factor.transpose(-1, -2) @ key_factor)
    root: Tensor = (s * scale[:, None]).sqrt().unsqueeze(-2)

    def basis(factor: Tensor, rotation: Tensor) -> Tensor:
        # A triangular solve, not an inverse: factors of nearly dependent coordinates are ill-conditioned.
        directions: Tensor = torch.linalg.solve_triangular(factor.transpose(-1, -2), rotation, upper=True)
        return directions * root

    return basis(query_factor, u), basis(key_factor, vt.transpose(-1, -2))
