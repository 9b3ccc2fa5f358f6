"""What the sites of a graph see: scores, queries and keys, in float64."""

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.layout import score_factor, site_inputs
from asapc.types.site import Site

Activations = dict[str, tuple[Tensor, Tensor, Tensor]]  # (scores, queries, keys) by the site's name, float64


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
    return scores.masked_fill(scores < MIN_LIVE, -inf) if site.loop.masked else scores


def float64_inputs(site: Site, values: Mapping[str, Tensor]) -> list[Tensor | None]:
    """What the operator of a site is given, in float64."""
    given = [values[operand.node].double() for operand in site.wiring.operands]
    return site_inputs(site, given, score_factor(site, torch.float64))
