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
# Coordinates that a dual is estimated from, if slices do not ask for more: the first carry most of the score. With all
# of a head's 16 errors were 0 to 8 % lower, with all of 64 up to a quarter higher, for twice to eight times the work
# (docs/method.md).
COORDINATES = 8


def balanced_bases(sites: Sequence[Site], activations: Iterator[Activations]) -> dict[str, tuple[Tensor, Tensor]]:
    """Bases (H, D, D) of queries and keys by the site's name, from streamed activations."""
    scatters: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in activations:
        for site in sites:
            scores, queries, keys = batch[site.name]
            live_queries, live_keys = live_mask(scores) if site.loop.masked else (None, None)
            both = scatter(queries, live_queries), scatter(keys, live_keys)
            old = scatters.get(site.name)
            scatters[site.name] = both if old is None else (old[0] + both[0], old[1] + both[1])
    scales = {site.name: site.wiring.product.score_scale for site in sites if site.wiring.product is not None}
    return {name: balance(total(q), total(k), scales[name]) for name, (q, k) in scatters.items()}


def scatter(points: Tensor, live: Tensor | None = None) -> Tensor:
    """Sum over samples of the within-sample covariance: (B, H, N, D) to (H, D, D), of points that are live."""
    points = points.transpose(-1, -2)
    weights = points.new_ones(1, 1, 1, points.shape[-1]) if live is None else live
    centred = (points - mean(points, live)) * weights
    return torch.einsum("bhdn,bhen->hde", centred / weights.sum(dim=-1, keepdim=True).clamp_min(1), centred)


def balance(query_scatter: Tensor, key_scatter: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bases in which queries and keys have the same diagonal covariance and the score is kept.

    With C_q = R R^T, C_k = L L^T and R^T L = U s V^T the bases are R^-T U s^1/2 and L^-T V s^1/2: their
    product is the identity, so that (q @ query_basis).(k @ key_basis) = scale * q.k, and both sides
    have covariance s. The score is then a sum of one-dimensional products, sorted by how much each
    carries: the directions on which a slice tells most. asapc's own; docs/method.md.

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
        solved: Tensor = torch.linalg.solve_triangular(factor.transpose(-1, -2), rotation, upper=True)
        return solved * root

    return basis(query_factor, u), basis(key_factor, vt.transpose(-1, -2))
