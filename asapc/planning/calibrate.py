"""Streams calibration samples through the graph and fits the sliced duals of every site.

The first pass sums the covariances that balanced bases are computed from, the second counts where hinges go. Each pass
after them sums the Gram matrices of one linear map, which `fit` solves in closed form. Maps are fitted in order, since
a closure step works on the outputs of the maps before it. Only sums are kept, in float64, and a few vectors over the
points, which take no more memory than the samples; several processes can share the samples (`distributed`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from asapc.ops.features import live_mask
from asapc.ops.sinkhorn import scaled_closures
from asapc.ops.sliced_dual import SlicedDual, target_dual, with_log
from asapc.passes.record import record
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn, operator_node
from asapc.planning.activations import Activations, activation
from asapc.planning.bases import COORDINATES, balanced_bases
from asapc.planning.distributed import processes_sharing, share, total
from asapc.planning.hinges import count_places, quantiles
from asapc.planning.operators import exact_operator
from asapc.planning.ridge import fit, gain_of_doubling
from asapc.types.choices import SIDES, FeatureSet, Regression, Side, SlicedDualParams
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Loop, Site

BATCH = 16  # samples, where they are short; a pass holds the scores of every site for that many
# Queries, and keys, that a fit looks at: beyond as many, more points say less than they cost.
MAX_POINTS = 2048


class FitKey(NamedTuple):
    """Names one sliced dual of a calibration: its site and its features."""

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
) -> dict[FitKey, SlicedDualParams]:
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
    activations = activation_stream(graph, sites)
    advance("covariances of queries and keys")
    bases = balanced_bases(sites, activations(fitting))
    counts: dict[tuple[str, Side], Tensor] = {}
    # Hinges lie at quantiles of coordinates, which only the bases define: one pass more.
    if any(features.pieces for site in sites for features in feature_sets[site.name]):
        advance("where the hinges go")
        counts = count_places(sites, bases, activations(fitting))
    params = {
        FitKey(site.name, features): without_maps(site, features, bases[site.name], counts)
        for site in sites
        for features in feature_sets[site.name]
    }
    # Of the batches that are fitted, how many show what half of the samples would give.
    middle = 0 if processes_sharing() > 1 else ceil(len(fitting) / graph.samples_at_once(BATCH)) // 2
    of_fitting: list[BatchCache] = []
    of_selection: list[BatchCache] = []
    for step in range(1 + closure_steps):
        open_params = {key: of_set for key, of_set in params.items() if not (step and key.features.one_pass)}
        if not open_params:
            break  # one pass has no closure steps
        advance(f"closure step {step} of {closure_steps}" if step else "map from features to dual")
        half: dict[FitKey, Regression] = {}
        problems: dict[FitKey, Regression] = {}
        for number, problems in enumerate(running(sites, open_params, activations(fitting), of_fitting), 1):
            half = problems if number == middle else half
        problems = {key: add_processes(statistics) for key, statistics in problems.items()}
        # The penalty is chosen on other samples: on its own the smallest always fits best.
        others = regressions(sites, open_params, activations(selection), of_selection)
        for key in open_params:
            weights = fit(problems[key], others[key])
            doubling = gain_of_doubling(half[key], problems[key], others[key], weights) if half else None
            params[key] = add_map(params[key], weights, doubling)
    dtypes = {site.name: site.wiring.dtype for site in sites}
    return {key: to_dtype(of_set, dtypes[key.site]) for key, of_set in params.items()}


def activation_stream(graph: CapturedGraph, sites: Sequence[Site]) -> Callable[[Samples], Iterator[Activations]]:
    """Return a function that runs the teacher on this process's share of samples and yields what the sites see."""
    operands = operand_stream(graph, sites)

    def activations(samples: Samples) -> Iterator[Activations]:
        for values in operands(share(samples)):
            yield {site.name: thin(activation(site, values)) for site in sites}

    return activations


def thin(activations: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Keep MAX_POINTS queries and keys of a site's activations, drawn with a fixed seed: a smaller transport problem.

    Its duals are those of the whole one, but for a constant and for noise that a fit over thousands of points averages.
    """
    scores, queries, keys = activations
    rows, columns = drawn(scores.shape[-2]), drawn(scores.shape[-1])
    return scores[..., rows, :][..., columns], queries[..., rows, :], keys[..., columns, :]


def thin_masses(loop: Loop) -> tuple[Tensor | None, Tensor | None]:
    """Return the masses of the rows and columns that `thin` keeps; None where all are the same."""
    masses = loop.row_mass, loop.column_mass
    rows, columns = (None if mass.numel() == 1 else mass[drawn(len(mass))] for mass in masses)
    return rows, columns


def drawn(count: int) -> Tensor | slice:
    """Return which of so many points are kept, in their order."""
    if count <= MAX_POINTS:
        return slice(None)
    # Not every other one: points may lie on a grid.
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAX_POINTS].sort().values


def operand_stream(graph: CapturedGraph, sites: Sequence[Site]) -> Callable[[Samples], Iterator[dict[str, Tensor]]]:
    """Return a function that runs the teacher on samples and yields the values of all operands by their nodes' names.

    Exact forms replace the loops: what the sites see is the same up to rounding, in a tenth of the time.
    """
    exact = {site.name: exact_operator(site, wide=True) for site in sites}
    module = RewriteSinkhorn(sites, exact)(graph.program.module()).program
    size = graph.samples_at_once(BATCH)
    # What one site reads may be what another gives, as in plan @ (other_plan @ v): an operator's result by now.
    results = {site.wiring.result.node: operator_node(site) for site in sites}
    nodes = {
        operand.node: results.get(operand.node, operand.node) for site in sites for operand in site.wiring.operands
    }

    def operands(samples: Samples) -> Iterator[dict[str, Tensor]]:
        for batch in samples.batches(size):
            recorded = record(module, batch, nodes.values())
            yield {name: recorded[node] for name, node in nodes.items()}

    return operands


def without_maps(
    site: Site, features: FeatureSet, bases: tuple[Tensor, Tensor], counts: Mapping[tuple[str, Side], Tensor]
) -> SlicedDualParams:
    """Return the parameters of a sliced dual before its first linear map is fitted.

    Args:
        site: the site.
        features: what its dual is estimated from.
        bases: balanced bases (H, D, D) of queries and keys.
        counts: of `count_places`, read only where there are hinges.
    """
    knots = torch.zeros(site.loop.heads, 0, 0, dtype=torch.float64)
    if features.pieces:
        knots = quantiles(counts[site.name, features.side], features.pieces)
    slices = min(features.slices, site.head_dim or 0)
    # Coordinates are sorted by how much of the score they carry, so that the first are the ones to keep.
    query_basis, key_basis = (basis[..., : max(COORDINATES, slices)] for basis in bases)
    return SlicedDualParams(
        query_basis, key_basis, slices, knots, side=features.side, paired=features.paired, one_pass=features.one_pass
    )


def add_map(params: SlicedDualParams, weights: Tensor, doubling: float | None) -> SlicedDualParams:
    """Append a linear map to those of a sliced dual, with what twice as many samples would do for it."""
    gains = () if doubling is None else (*params.doubling, doubling)
    return replace(params, weights=(*params.weights, weights), doubling=gains)


@dataclass(frozen=True, eq=False)
class BatchCache:
    """What is known of a batch from the maps that were fitted before, since it takes long to compute.

    Attributes:
        targets: what `centred_target` returns, by the site's name, the side and whether one pass follows.
        closures: of the estimates of each sliced dual so far, each (B, H, 1, N).
    """

    targets: dict[tuple[str, Side, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    closures: dict[FitKey, list[Tensor]] = field(default_factory=dict)


def regressions(
    sites: Sequence[Site],
    params: Mapping[FitKey, SlicedDualParams],
    activations: Iterator[Activations],
    caches: list[BatchCache] | None = None,
) -> dict[FitKey, Regression]:
    """Gather statistics of the next linear map of each sliced dual: its vectors so far against `target_dual`.

    Args:
        sites: the sites.
        params: the sliced duals.
        activations: batches of samples.
        caches: of the batches, empty at first; brought up to date.
    """
    problems: dict[FitKey, Regression] = {}
    for problems in running(sites, params, activations, caches):  # noqa: B007  the last is all that is kept
        pass
    return {key: add_processes(statistics) for key, statistics in problems.items()}


def running(
    sites: Sequence[Site],
    params: Mapping[FitKey, SlicedDualParams],
    activations: Iterator[Activations],
    caches: list[BatchCache] | None = None,
) -> Iterator[dict[FitKey, Regression]]:
    """Yield what `regressions` gathers, of the batches so far and of this process alone."""
    problems: dict[FitKey, Regression] = {}
    caches = [] if caches is None else caches
    for number, batch in enumerate(activations):
        if number == len(caches):
            caches.append(BatchCache())
        for site, side in product(sites, SIDES):
            of_side = {key: p for key, p in params.items() if key.site == site.name and p.side == side}
            if of_side:
                for key, statistics in of_batch(site, side, of_side, batch[site.name], caches[number]).items():
                    problems[key] = add(problems[key], statistics) if key in problems else statistics
        yield dict(problems)


def of_batch(
    site: Site,
    side: Side,
    params: Mapping[FitKey, SlicedDualParams],
    activations: tuple[Tensor, Tensor, Tensor],
    cache: BatchCache,
) -> dict[FitKey, Regression]:
    """Gather statistics of one batch for the next linear maps of a site's sliced duals of one side."""
    scores, masses = activations[0], thin_masses(site.loop)
    for one_pass in {key.features.one_pass for key in params}:
        if (site.name, side, one_pass) not in cache.targets:
            cache.targets[site.name, side, one_pass] = centred_target(site, side, scores, one_pass)
    features = {key: features_of(site, of_set, activations) for key, of_set in params.items()}
    closures = {key: cache.closures.setdefault(key, []) for key in params}
    while pending := [key for key, of_set in params.items() if len(closures[key]) < len(of_set.weights)]:
        # All at once: the kernel is the same for all.
        duals = torch.cat([dual_of(params[key], features[key], closures[key]) for key in pending], dim=-2)
        oriented = scores.transpose(-1, -2) if side == "queries" else scores
        other_mass, own_mass = masses[:: -1 if side == "queries" else 1]
        closed = scaled_closures(oriented, with_log(duals, own_mass), other_mass)
        for key, closure in zip(pending, closed.unbind(dim=-2), strict=True):
            closures[key].append(closure.unsqueeze(-2))
    return {
        key: regression(
            torch.cat([features[key], *closures[key]], dim=-2), *cache.targets[site.name, side, key.features.one_pass]
        )
        for key in params
    }


def features_of(site: Site, params: SlicedDualParams, activations: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the features (B, H, F, N) of a sliced dual."""
    return SlicedDual(replace(params, weights=()), site.loop.last, site.loop.masked).vectors(*activations)


def dual_of(params: SlicedDualParams, features: Tensor, closures: Sequence[Tensor]) -> Tensor:
    """Estimate (B, H, 1, N) that the map after these closures makes."""
    vectors = torch.cat([features, *closures], dim=-2)
    return torch.einsum("hf,bhfn->bhn", params.weights[len(closures)], vectors).unsqueeze(-2)


def centred_target(site: Site, side: Side, scores: Tensor, one_pass: bool) -> tuple[Tensor, Tensor]:
    """Return the dual (B, H, 1, N) to regress on, centred, and which of its points are live, as zeros and ones."""
    target = target_dual(
        scores, site.loop.half_steps, side, site.loop.last, one_pass, *thin_masses(site.loop)
    ).unsqueeze(-2)
    live = live_mask(scores)[SIDES.index(side)] if site.loop.masked else torch.ones_like(target)
    return centre(target, live), live


def regression(vectors: Tensor, target: Tensor, live: Tensor) -> Regression:
    """Gather statistics of one batch: of vectors (B, H, F, N) against a centred target (B, H, 1, N)."""
    vectors = centre(vectors, live)
    return Regression(
        gram=torch.einsum("bhfn,bhen->hfe", vectors, vectors),
        moment=torch.einsum("bhfn,bhen->hf", vectors, target),
        energy=target.square().sum(dim=(0, 2, 3)),
        count=live[:, 0].sum().double(),
    )


def centre(vectors: Tensor, live: Tensor) -> Tensor:
    """Subtract from vectors (B, H, F, N) their means over what is live (B, H, 1, N): a constant over points is free."""
    means = (vectors * live).sum(dim=-1, keepdim=True) / live.sum(dim=-1, keepdim=True).clamp_min(1)
    return (vectors - means) * live


def add(one: Regression, other: Regression) -> Regression:
    """Combine the statistics of two sets of samples."""
    sums = (getattr(one, f.name) + getattr(other, f.name) for f in fields(Regression))
    return Regression(*sums)


def add_processes(statistics: Regression) -> Regression:
    """Combine the statistics of all processes' samples, from those of this one's share."""
    return Regression(*(total(getattr(statistics, f.name)) for f in fields(Regression)))


def to_dtype(params: SlicedDualParams, dtype: torch.dtype) -> SlicedDualParams:
    """Round fitted parameters to the precision that the operator runs in."""
    return replace(
        params,
        query_basis=params.query_basis.to(dtype),
        key_basis=params.key_basis.to(dtype),
        knots=params.knots.to(dtype),
        weights=tuple(weights.to(dtype) for weights in params.weights),
    )
