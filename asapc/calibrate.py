"""Streams calibration samples through the graph and fits the sliced duals of every site.

The first pass gives the covariances that the balanced bases are made of, the second where hinges go; each pass after
them the Gram matrices of one linear map, from which `fit` has the map in closed form. Maps are fitted in order, since a
closure step works on what the maps before it give. Only sums are kept, in float64, so that memory does not grow with
the number of samples, and samples can be shared out to several processes (`distributed`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from asapc.artifacts import CapturedGraph, Samples, Site
from asapc.choices import FeatureSet, Regression, Side, SlicedDualParams
from asapc.distributed import share, total
from asapc.fit import fit
from asapc.operators import exact_operator
from asapc.ops.features import live_mask, mean, project, variance
from asapc.ops.scaling import LOWEST_LIVE
from asapc.ops.sliced_dual import SlicedDual, target_dual
from asapc.passes.layout import operands, score_factor, site_inputs
from asapc.passes.record import record
from asapc.passes.rewrite_sinkhorn import RewriteSinkhorn

BATCH = 16
# Added to the covariances, relative to their mean variance, so that constant or dependent coordinates
# leave them positive definite.
COVARIANCE_RIDGE = 1e-6
# Coordinates that a dual is estimated from, if slices do not ask for more: the first carry most of the score. With all
# of a head's 16 errors were 0 to 8 % lower, with all of 64 up to a quarter higher, for twice to eight times the work
# (docs/method.md).
COORDINATES = 8
# Quantiles come from counts in so many bins, up to so many standard deviations: sums, as everything that is kept.
BINS, WIDEST = 400, 5.0

Activations = dict[str, tuple[Tensor, Tensor, Tensor]]  # (scores, queries, keys) by the site's name, float64


SIDES: tuple[Side, Side] = ("queries", "keys")  # in the order of `Activations`


class Fitted(NamedTuple):
    """One sliced dual that is fitted: of which site, from which features."""

    site: str
    features: FeatureSet


def calibrate(
    graph: CapturedGraph,
    feature_sets: Mapping[str, Sequence[FeatureSet]],
    sites: Sequence[Site],
    fitting: Samples,
    selection: Samples,
    closure_steps: int,
    advance: Callable[[str], None] = lambda detail: None,
) -> dict[Fitted, SlicedDualParams]:
    """Fit sliced duals, each site's from each of its feature sets; parameters in the dtype that the site runs in.

    Args:
        graph: the captured teacher.
        feature_sets: by the site's name; slices and hinges are at most as many as the head has axes.
        sites: sites in the graph that have queries and keys, of at least three half-steps.
        fitting: samples to fit.
        selection: samples that choose the ridge penalties.
        closure_steps: fitted closure steps after the first estimate.
        advance: called with a line about the progress.
    """
    # With exact forms in the place of the loops: what the sites see is the same up to rounding, in a tenth of the time.
    exact = {site.name: exact_operator(site, wide=True) for site in sites}
    module = RewriteSinkhorn(sites, exact)(graph.program.module()).program
    names = {operand.node for site in sites for operand in operands(site)}

    def activations(samples: Samples) -> Iterator[Activations]:
        for batch in share(samples).batches(BATCH):
            values = record(module, batch, names)
            yield {site.name: activation(site, values) for site in sites}

    advance("covariances of queries and keys")
    bases = balanced_bases(sites, activations(fitting))
    counts: dict[tuple[str, Side], Tensor] = {}
    if any(features.pieces for site in sites for features in feature_sets[site.name]):
        advance("where the hinges go")
        counts = count_places(sites, bases, activations(fitting))
    params = {}
    for site in sites:
        none = torch.zeros(site.heads, 0, 0, dtype=torch.float64)
        for features in feature_sets[site.name]:
            places = quantiles(counts[site.name, features.side], features.pieces) if features.pieces else none
            slices = min(features.slices, site.head_dim or 0)
            of_queries, of_keys = (basis[..., : max(COORDINATES, slices)] for basis in bases[site.name])
            unfitted = SlicedDualParams(of_queries, of_keys, slices, places, side=features.side, paired=features.paired)
            params[Fitted(site.name, features)] = unfitted
    for step in range(1 + closure_steps):
        advance(f"closure step {step} of {closure_steps}" if step else "map from features to dual")
        problems, others = (regressions(sites, params, activations(samples)) for samples in (fitting, selection))
        params = {
            key: replace(known, weights=(*known.weights, fit(problems[key], others[key])))
            for key, known in params.items()
        }
    dtypes = {site.name: site.dtype for site in sites}
    return {key: to_dtype(known, dtypes[key.site]) for key, known in params.items()}


def activation(site: Site, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, -inf where masked, queries and keys of a site that has queries and keys, in float64."""
    _, queries, keys, _ = float64_inputs(site, values)
    if queries is None or keys is None:
        raise ValueError(f"site {site.name} has no queries and keys to fit on")
    return masked_scores(site, values), queries, keys


def masked_scores(site: Site, values: Mapping[str, Tensor]) -> Tensor:
    """Scores (B, H, N, M) of a site, in units of the temperature, -inf where masked, in float64."""
    scores, *_ = float64_inputs(site, values)
    assert scores is not None
    return scores.masked_fill(scores < LOWEST_LIVE, -inf) if site.masked else scores


def float64_inputs(site: Site, values: Mapping[str, Tensor]) -> list[Tensor | None]:
    """What the operator of a site is given, in float64."""
    given = [values[operand.node].double() for operand in operands(site)]
    return site_inputs(site, given, score_factor(site, torch.float64))


def balanced_bases(sites: Sequence[Site], activations: Iterator[Activations]) -> dict[str, tuple[Tensor, Tensor]]:
    """Bases (H, D, D) of queries and keys by the site's name, from streamed activations."""
    scatters: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in activations:
        for site in sites:
            scores, queries, keys = batch[site.name]
            live_queries, live_keys = live_mask(scores) if site.masked else (None, None)
            both = scatter(queries, live_queries), scatter(keys, live_keys)
            old = scatters.get(site.name)
            scatters[site.name] = both if old is None else (old[0] + both[0], old[1] + both[1])
    temperatures = {s.name: torch.ones(()) if s.temperature is None else s.temperature for s in sites}
    return {name: balance(total(q), total(k), temperatures[name]) for name, (q, k) in scatters.items()}


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


def count_places(
    sites: Sequence[Site], bases: Mapping[str, tuple[Tensor, Tensor]], activations: Iterator[Activations]
) -> dict[tuple[str, Side], Tensor]:
    """How queries and keys lie along the first coordinates: counts (H, C, BINS) by the site's name and the side.

    In standard deviations of each sample, from -WIDEST to WIDEST.
    """
    counts: dict[tuple[str, Side], Tensor] = {}
    for batch in activations:
        for site in sites:
            scores, *points = batch[site.name]
            live_masks = live_mask(scores) if site.masked else (None, None)
            for side, of_side, basis, live in zip(SIDES, points, bases[site.name], live_masks, strict=True):
                x = project(of_side, basis)[..., :COORDINATES, :]
                x = x - mean(x, live)
                places = x / variance(x, live).sqrt()
                bins = ((places / WIDEST + 1) * (BINS / 2)).long().clamp(0, BINS - 1).permute(1, 2, 0, 3).flatten(2)
                weights = torch.ones_like(places) if live is None else live.expand_as(places)
                found = torch.zeros(*bins.shape[:2], BINS, dtype=torch.float64)
                found.scatter_add_(-1, bins, weights.permute(1, 2, 0, 3).flatten(2))
                key = (site.name, side)
                counts[key] = counts[key] + found if key in counts else found
    return {key: total(of_side) for key, of_side in counts.items()}


def quantiles(counts: Tensor, pieces: int) -> Tensor:
    """Places (H, C, pieces - 1) that part the points in equal shares, from counts (H, C, BINS)."""
    shares = (counts.cumsum(dim=-1) / counts.sum(dim=-1, keepdim=True).clamp_min(1)).contiguous()
    levels = (torch.arange(1, pieces, dtype=torch.float64) / pieces).expand(*counts.shape[:2], -1).contiguous()
    bins = torch.searchsorted(shares, levels).clamp(max=BINS - 1)
    return ((bins + 0.5) / (BINS / 2) - 1) * WIDEST


def regressions(
    sites: Sequence[Site], params: Mapping[Fitted, SlicedDualParams], activations: Iterator[Activations]
) -> dict[Fitted, Regression]:
    """Statistics of the next linear map of each sliced dual: the vectors at hand against `target_dual`."""
    problems: dict[Fitted, Regression] = {}
    for batch in activations:
        for site in sites:
            scores, queries, keys = batch[site.name]
            targets = {}
            for side in {known.side for key, known in params.items() if key.site == site.name}:
                target = target_dual(scores, site.half_steps, side, site.last).unsqueeze(-2)
                live = live_mask(scores)[SIDES.index(side)] if site.masked else torch.ones_like(target)
                targets[side] = centre(target, live), live
            for key, known in params.items():
                if key.site != site.name:
                    continue
                target, live = targets[known.side]
                operator = SlicedDual(known, site.last, site.masked, wide=True)  # which serves all scores
                vectors = centre(operator.vectors(scores, queries, keys), live)
                found = Regression(
                    gram=torch.einsum("bhfn,bhen->hfe", vectors, vectors),
                    moment=torch.einsum("bhfn,bhen->hf", vectors, target),
                    energy=target.square().sum(dim=(0, 2, 3)),
                    count=live[:, 0].sum().double(),
                )
                problems[key] = add(problems[key], found) if key in problems else found
    return {
        key: Regression(*(total(getattr(found, f.name)) for f in fields(Regression))) for key, found in problems.items()
    }


def centre(vectors: Tensor, live: Tensor) -> Tensor:
    """Vectors (B, H, F, N) less their means over what is live (B, H, 1, N): a constant over the points is free."""
    means = (vectors * live).sum(dim=-1, keepdim=True) / live.sum(dim=-1, keepdim=True).clamp_min(1)
    return (vectors - means) * live


def add(one: Regression, other: Regression) -> Regression:
    """Statistics of the samples of both."""
    sums = (getattr(one, f.name) + getattr(other, f.name) for f in fields(Regression))
    return Regression(*sums)


def to_dtype(params: SlicedDualParams, dtype: torch.dtype) -> SlicedDualParams:
    """Round fitted parameters to the precision that the operator runs in."""
    return replace(
        params,
        query_basis=params.query_basis.to(dtype),
        key_basis=params.key_basis.to(dtype),
        knots=params.knots.to(dtype),
        weights=tuple(weights.to(dtype) for weights in params.weights),
    )
