"""Streams calibration samples through the graph and fits the sliced dual of every site.

The first pass gives the covariances that the balanced bases are made of; each pass after it the Gram matrices
of one linear map, from which `fit` has the map in closed form. Maps are fitted in order, since a
closure step works on what the maps before it give. Memory does not grow with the number of samples; all
statistics are float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from asapc.artifacts import CapturedGraph, Regression, Samples, Site, SlicedDualParams
from asapc.fit import ridge
from asapc.ops.scaling import LOWEST_LIVE
from asapc.ops.sinkhorn import sinkhorn_duals
from asapc.ops.sliced_dual import SlicedDual, live_mask, mean
from asapc.passes.layout import operands, score_factor, site_inputs
from asapc.passes.record import record

BATCH = 16
# Added to the covariances, relative to their mean variance, so that constant or dependent coordinates
# leave them positive definite.
COVARIANCE_RIDGE = 1e-6
# On standardised features. The first map extrapolates from a few features and wants damping; the closures that
# the later ones combine are nearly parallel, and their small differences are what counts.
FEATURE_RIDGE, CLOSURE_RIDGE = 1e-3, 1e-5

Activations = dict[str, tuple[Tensor, Tensor, Tensor]]  # (scores, queries, keys) by the site's name, float64


def calibrate(
    graph: CapturedGraph,
    sites: Sequence[Site],
    samples: Samples,
    slices: int,
    closure_steps: int,
    advance: Callable[[str], None] = lambda detail: None,
) -> dict[str, SlicedDualParams]:
    """Fit the sliced dual of every site; parameters by the site's name, in the dtype that the site runs in.

    Args:
        graph: the captured teacher.
        sites: sites in it that end on rows, after more than two half-steps.
        samples: calibration samples.
        slices: sorted slices; a site with a smaller head size gets as many as that.
        closure_steps: fitted closure steps after the first estimate.
        advance: called with a line about the progress.
    """
    module = graph.program.module()
    names = {operand.node for site in sites for operand in operands(site)}

    def activations() -> Iterator[Activations]:
        for batch in samples.batches(BATCH):
            values = record(module, batch, names)
            yield {site.name: activation(site, values) for site in sites}

    advance("covariances of queries and keys")
    params = {
        site.name: SlicedDualParams(*bases, slices=min(slices, site.head_dim or 0))
        for site, bases in zip(sites, balanced_bases(sites, activations()), strict=True)
    }
    for step in range(1 + closure_steps):
        advance(f"closure step {step} of {closure_steps}" if step else "map from slices to dual")
        problems = regressions(sites, params, activations())
        penalty = CLOSURE_RIDGE if step else FEATURE_RIDGE
        params = {name: replace(p, weights=(*p.weights, ridge(problems[name], penalty))) for name, p in params.items()}
    return {site.name: to_dtype(params[site.name], site.dtype) for site in sites}


def activation(site: Site, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, -inf where masked, queries and keys of a site that has queries and keys, in float64."""
    given = [values[operand.node].double() for operand in operands(site)]
    scores, queries, keys, _ = site_inputs(site, given, score_factor(site, torch.float64))
    if scores is None or queries is None or keys is None:
        raise ValueError(f"site {site.name} has no queries and keys to fit on")
    return scores.masked_fill(scores < LOWEST_LIVE, -inf) if site.masked else scores, queries, keys


def balanced_bases(sites: Sequence[Site], activations: Iterator[Activations]) -> list[tuple[Tensor, Tensor]]:
    """Bases (H, D, D) of queries and keys for each site, from streamed activations."""
    scatters = [(torch.zeros(()), torch.zeros(())) for _ in sites]
    for batch in activations:
        for i, site in enumerate(sites):
            scores, queries, keys = batch[site.name]
            live_queries, live_keys = live_mask(scores) if site.masked else (None, None)
            both = scatter(queries, live_queries), scatter(keys, live_keys)
            scatters[i] = (scatters[i][0] + both[0], scatters[i][1] + both[1])
    temperatures = [torch.ones(()) if site.temperature is None else site.temperature for site in sites]
    return [balance(*pair, scale) for pair, scale in zip(scatters, temperatures, strict=True)]


def scatter(points: Tensor, live: Tensor | None = None) -> Tensor:
    """Sum over samples of the within-sample covariance: (B, H, N, D) to (H, D, D), of points that are live."""
    if live is None:
        centred = points - points.mean(dim=-2, keepdim=True)
        return torch.einsum("bhnd,bhne->hde", centred, centred) / points.shape[-2]
    weights = live.transpose(-1, -2)
    count = weights.sum(dim=-2, keepdim=True).clamp_min(1)
    centred = (points - (points * weights).sum(dim=-2, keepdim=True) / count) * weights
    return torch.einsum("bhnd,bhne->hde", centred / count, centred)


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


def regressions(
    sites: Sequence[Site], params: dict[str, SlicedDualParams], activations: Iterator[Activations]
) -> dict[str, Regression]:
    """Statistics, by the site's name, of the next linear map: the vectors at hand against the target dual.

    The target is the teacher's query-side dual two half-steps before its end: the closure of that is
    the teacher's plan, exactly (docs/method.md).
    """
    problems: dict[str, Regression] = {}
    for batch in activations:
        for site in sites:
            scores, queries, keys = batch[site.name]
            vectors = SlicedDual(params[site.name], site.masked).vectors(scores, queries, keys)
            target = sinkhorn_duals(scores, site.half_steps - 2, site.last)[0].unsqueeze(-2)
            live = live_mask(scores)[0] if site.masked else torch.ones_like(target)
            # A constant over the queries is free in both.
            vectors = (vectors - mean(vectors, live)) * live
            target = ((target - mean(target, live)) * live).squeeze(-2)
            gram = torch.einsum("bhfn,bhen->hfe", vectors, vectors)
            moment = torch.einsum("bhfn,bhn->hf", vectors, target)
            count = int(live[:, 0].sum())
            if (old := problems.get(site.name)) is not None:
                gram, moment, count = gram + old.gram, moment + old.moment, count + old.count
            problems[site.name] = Regression(gram, moment, count)
    return problems


def to_dtype(params: SlicedDualParams, dtype: torch.dtype) -> SlicedDualParams:
    """Round fitted parameters to the precision that the operator runs in."""
    return replace(
        params,
        query_basis=params.query_basis.to(dtype),
        key_basis=params.key_basis.to(dtype),
        weights=tuple(weights.to(dtype) for weights in params.weights),
    )
