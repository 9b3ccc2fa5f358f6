"""Activations at the sites of a graph: scores, queries and keys, in float64."""

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.layout import Inputs, score_factor, site_inputs
from asapc.types.site import Site

Activations = dict[str, tuple[Tensor, Tensor, Tensor]]  # (scores, queries, keys) by the site's name, float64


def activation(site: Site, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, -inf where masked, queries and keys of a site, in float64.

    Raises:
        ValueError: the site has no queries and keys.
    """
    inputs = float64_inputs(site, values)
    if inputs.queries is None or inputs.keys is None:
        raise ValueError(f"site {site.name} has no queries and keys to fit on")
    return masked(site, inputs.scores), inputs.queries, inputs.keys


def masked_scores(site: Site, values: Mapping[str, Tensor]) -> Tensor:
    """Return scores (B, H, N, M) of a site in units of the temperature, -inf where masked, in float64."""
    return masked(site, float64_inputs(site, values).scores)


def masked(site: Site, scores: Tensor) -> Tensor:
    """Return scores with -inf where they are masked."""
    # Code masks with numbers from -1e9 to -inf; one value for all keeps statistics free of theirs.
    return scores.masked_fill(scores < MIN_LIVE, -inf) if site.loop.masked else scores


def float64_inputs(site: Site, values: Mapping[str, Tensor]) -> Inputs:
    """Return the inputs of a site's operator in float64."""
    operands = [values[operand.node].double() for operand in site.wiring.operands]
    return site_inputs(site, operands, score_factor(site, torch.float64))
