"""Places hinges: at quantiles of the points along the coordinates, from streamed counts."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from asapc.ops.features import live_mask, mean, project, variance
from asapc.planning.activations import Activations
from asapc.planning.bases import COORDINATES
from asapc.planning.distributed import total
from asapc.types.choices import SIDES, Side
from asapc.types.site import Site

# Quantiles come from counts in this many bins, up to this many standard deviations: counts can be streamed, and added
# up over processes, where sorted points cannot.
BINS, MAX_DEVIATIONS = 400, 5.0


def count_places(
    sites: Sequence[Site], bases: Mapping[str, tuple[Tensor, Tensor]], activations: Iterator[Activations]
) -> dict[tuple[str, Side], Tensor]:
    """Count how queries and keys lie along the first coordinates: (H, C, BINS) by the site's name and the side.

    Bins run from -MAX_DEVIATIONS to MAX_DEVIATIONS, in standard deviations of each sample.
    """
    counts: dict[tuple[str, Side], Tensor] = {}
    for batch in activations:
        for site in sites:
            scores, *points = batch[site.name]
            live_masks = live_mask(scores) if site.loop.masked else (None, None)
            for side, of_side, basis, live in zip(SIDES, points, bases[site.name], live_masks, strict=True):
                histogram = count(project(of_side, basis)[..., :COORDINATES, :], live)
                key = (site.name, side)
                counts[key] = counts[key] + histogram if key in counts else histogram
    return {key: total(of_side) for key, of_side in counts.items()}


def count(x: Tensor, live: Tensor | None) -> Tensor:
    """Count coordinates (B, H, C, N) of live points in bins: (H, C, BINS)."""
    x = x - mean(x, live)
    places = x / variance(x, live).sqrt()
    # Points beyond the range go into the outermost bins: the counts, and so the quantiles inside, stay right.
    bins = ((places / MAX_DEVIATIONS + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    bins = bins.permute(1, 2, 0, 3).flatten(2)
    weights = torch.ones_like(places) if live is None else live.expand_as(places)
    histogram = torch.zeros(*bins.shape[:2], BINS, dtype=torch.float64)
    return histogram.scatter_add_(-1, bins, weights.permute(1, 2, 0, 3).flatten(2))


def quantiles(counts: Tensor, pieces: int) -> Tensor:
    """Return the places (H, C, pieces - 1) that part the points in equal shares, from counts (H, C, BINS)."""
    shares = (counts.cumsum(dim=-1) / counts.sum(dim=-1, keepdim=True).clamp_min(1)).contiguous()
    levels = (torch.arange(1, pieces, dtype=torch.float64) / pieces).expand(*counts.shape[:2], -1).contiguous()
    bins = torch.searchsorted(shares, levels).clamp(max=BINS - 1)
    # The middle of the bin, back in standard deviations.
    return ((bins + 0.5) / (BINS / 2) - 1) * MAX_DEVIATIONS
