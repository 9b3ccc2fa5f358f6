"""Streams calibration samples through the graph and fits the sliced duals of every site.

The first pass gives the covariances that the balanced bases are made of, the second where hinges go; each pass after
them the Gram matrices of one linear map, from which `fit` has the map in closed form. Maps are fitted in order, since a
closure step works on what the maps before it give. Only sums are kept, in float64, so that memory does not grow with
the number of samples, and samples can be shared out to several processes (`distributed`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from asapc.ops.features import live_mask
from asapc.ops.sliced_dual import SlicedDual, target_dual
from asapc.passes.record import record
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.activations import Activations, activation
from asapc.planning.bases import COORDINATES, balanced_bases
from asapc.planning.distributed import share, total
from asapc.planning.hinges import count_places, quantiles
from asapc.planning.operators import exact_operator
from asapc.planning.ridge import fit
from asapc.types.choices import SIDES, FeatureSet, Regression, Side, SlicedDualParams
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Site

BATCH = 16


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
    names = {operand.node for site in sites for operand in site.wiring.operands}

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
        none = torch.zeros(site.loop.heads, 0, 0, dtype=torch.float64)
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
    dtypes = {site.name: site.wiring.dtype for site in sites}
    return {key: to_dtype(known, dtypes[key.site]) for key, known in params.items()}


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
                target = target_dual(scores, site.loop.half_steps, side, site.loop.last).unsqueeze(-2)
                live = live_mask(scores)[SIDES.index(side)] if site.loop.masked else torch.ones_like(target)
                targets[side] = centre(target, live), live
            for key, known in params.items():
                if key.site != site.name:
                    continue
                target, live = targets[known.side]
                operator = SlicedDual(known, site.loop.last, site.loop.masked, wide=True)  # which serves all scores
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
