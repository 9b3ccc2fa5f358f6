"""Measures the range of the scores at each site."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asapc.ops.scaling import MAX_SPREAD
from asapc.ops.sinkhorn import kernel_spread
from asapc.planning.activations import masked_scores
from asapc.planning.calibrate import operand_stream
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Site


class ScoreRange(NamedTuple):
    """The scores of one site.

    Attributes:
        kernel_spread: largest `ops.sinkhorn.kernel_spread` of any batch, NaN where one is.
        deviations: standard deviation of each sample's scores, mean over the heads; one for each window where a sample
            attends in windows. Of small plans, a token's own, one for each, sample by sample: a mean would hide those
            that are far from the others.
    """

    kernel_spread: float
    deviations: Tensor


def score_ranges(graph: CapturedGraph, sites: Sequence[Site], samples: Samples) -> dict[str, ScoreRange]:
    """Measure ranges by the site's name, in one pass over the samples."""
    spreads: dict[str, list[float]] = {site.name: [] for site in sites}
    deviations: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for values in operand_stream(graph, sites)(samples):
        for site in sites:
            scores = masked_scores(site, values)
            spreads[site.name].append(kernel_spread(scores))
            of_heads = deviation(scores)
            deviations[site.name].append(of_heads.flatten() if own_plans(site) else of_heads.mean(dim=1))
    # Unlike Python's max, that of a tensor is NaN where any value is.
    largest = {name: torch.tensor(of_site, dtype=torch.float64).amax().item() for name, of_site in spreads.items()}
    return {name: ScoreRange(largest[name], torch.cat(of_site)) for name, of_site in deviations.items()}


def own_plans(site: Site) -> bool:
    """Return whether the heads of a site are tokens, each with a small plan of its own, as in hyper-connections."""
    return site.loop.small and site.wiring.product is None


def deviation(scores: Tensor) -> Tensor:
    """Compute the standard deviation (B, H) of the finite scores (B, H, N, M)."""
    live = scores.isfinite()
    count = live.sum(dim=(-1, -2), keepdim=True).clamp_min(1)
    means = torch.where(live, scores, 0.0).sum(dim=(-1, -2), keepdim=True) / count
    centred = torch.where(live, scores - means, 0.0)
    return (centred.square().sum(dim=(-1, -2)) / count.squeeze(-1, -2)).sqrt()


def wide_sites(ranges: Mapping[str, ScoreRange]) -> frozenset[str]:
    """Name the sites whose kernel has to be levelled on both axes, see `ops.scaling.MAX_SPREAD`."""
    # Not `>`: NaN counts as too wide.
    return frozenset(name for name, of_site in ranges.items() if not of_site.kernel_spread <= MAX_SPREAD)


def limits(ranges: Mapping[str, ScoreRange]) -> dict[str, tuple[float, float]]:
    """Return the least and the largest deviation of any sample, by the site's name."""
    deviations = {name: of_site.deviations for name, of_site in ranges.items()}
    return {name: (values.amin().item(), values.amax().item()) for name, values in deviations.items()}
