"""Trains the networks that stand for most half-steps on small plans, such as those of hyper-connections.

A calibration sample has a plan for each token, thousands in all, which is enough for a network of a few hundred
weights. It is trained through the half-steps after it, to the plans of the exact loop.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from asapc.ops.sinkhorn import other
from asapc.planning.activations import masked_scores
from asapc.planning.calibrate import operand_stream
from asapc.planning.distributed import processes_sharing
from asapc.planning.operators import amortised_operator, exact_operator, packs
from asapc.types.choices import AmortisedParams, Candidate
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import SMALL, Site

# Of those that `python -m benchmarks.amortised_tiny` tries; wider ones take longer than the half-steps that they save.
WIDTHS = (16, 32)
FOLLOWING = (1, 3, 5)  # half-steps after a network
TRAINED = 3  # of these, in training
STEPS, BATCH, RATE, SEED = 1000, 512, 6e-3, 0
MIN_PLANS, MAX_PLANS = 1024, 2**15  # to train on
MIN_SPREAD = 1e-6  # of an entry that is normalised


def why_not_amortised(site: Site) -> str | None:
    """Return why no network can stand for half-steps of a site; None where one can."""
    if not packs(site):
        return f"networks are for small plans, of at most {SMALL} entries, that are not masked"
    if site.loop.half_steps <= max(FOLLOWING):
        return f"{site.loop.half_steps} half-steps are too few for a network to pay"
    # Processes that share the calibration would each train another network.
    return None if processes_sharing() == 1 else "networks are not trained by several processes"


def amortise(graph: CapturedGraph, sites: Sequence[Site], samples: Samples) -> dict[str, list[Candidate]]:
    """Train networks for sites, and return their candidates by the site's name; none where there are too few plans."""
    gathered: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for values in operand_stream(graph, sites)(samples):
        for site in sites:
            gathered[site.name].append(masked_scores(site, values).flatten(0, 1))
        if all(sum(map(len, of_site)) >= MAX_PLANS for of_site in gathered.values()):
            break  # more plans would say little and take memory
    candidates: dict[str, list[Candidate]] = {site.name: [] for site in sites}
    for group in grouped(sites):
        scores = torch.stack([torch.cat(gathered[site.name])[:MAX_PLANS] for site in group])
        for width in WIDTHS if scores.shape[1] >= MIN_PLANS else ():
            for site, params in zip(group, train(group, scores, width), strict=True):
                candidates[site.name] += [Candidate("amortised", steps, inf, None, params) for steps in FOLLOWING]
    return candidates


def grouped(sites: Sequence[Site]) -> list[list[Site]]:
    """Group sites of which the loops are the same, on as many plans: their networks are trained together."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        loop = site.loop
        masses = loop.row_mass.tolist(), loop.column_mass.tolist()
        key = loop.half_steps, loop.last, loop.heads, loop.queries, loop.keys, loop.guard, masses
        groups.setdefault(repr(key), []).append(site)
    return list(groups.values())


def train(sites: Sequence[Site], scores: Tensor, width: int) -> list[AmortisedParams]:
    """Train a network of two hidden layers for each of K sites that are alike.

    Args:
        sites: the sites.
        scores: (K, plans, N, M) to train on, to the plans of the exact loop.
        width: of the hidden layers.
    """
    count, plans, n, m = scores.shape
    target = exact_operator(sites[0])(scores.double()).float()
    scores = scores.float()
    centre = torch.kron(torch.eye(n) - 1 / n, torch.eye(m) - 1 / m)
    centred = scores.flatten(2) @ centre
    means, spreads = centred.mean(dim=1), centred.std(dim=1).clamp_min(MIN_SPREAD)
    generator = torch.Generator().manual_seed(SEED)
    layers = initial(count, layer_sizes(sites[0], width), generator)

    def fold(layers: AmortisedParams, mean: Tensor, spread: Tensor) -> AmortisedParams:
        (first, *weights), (bias, *biases) = layers
        first = first / spread  # centring and normalising become part of the first layer
        return AmortisedParams((first @ centre, *weights), (bias - first @ mean, *biases))

    def fitted(layers: AmortisedParams, mean: Tensor, spread: Tensor, scores: Tensor) -> Tensor:
        params = fold(layers, mean, spread)
        kinds = zip(("weight", "bias"), params, strict=True)
        named = {f"{kind}_{number}": value for kind, values in kinds for number, value in enumerate(values)}
        result: Tensor = torch.func.functional_call(operator, named, (scores.unsqueeze(1),))
        return result.squeeze(1)

    operator = amortised_operator(sites[0], layers.one_of(0), TRAINED)
    parameters = [*layers.weights, *layers.biases]
    optimizer = torch.optim.Adam(parameters, RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_()
        for _ in range(STEPS):
            batch = torch.randint(plans, (BATCH,), generator=generator)
            results = torch.vmap(fitted)(layers, means, spreads, scores[:, batch])
            optimizer.zero_grad()
            (results - target[:, batch]).square().sum(dim=(2, 3)).mean(dim=1).sum().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        of_all = torch.vmap(fold)(layers, means, spreads)
    return [of_all.one_of(number) for number in range(count)]


def layer_sizes(site: Site, width: int) -> tuple[int, ...]:
    """Return the channels of a network between its layers, from the scores of a plan to the dual of one axis."""
    n, m = site.loop.queries, site.loop.keys
    return n * m, width, width, n if other(site.loop.last) == "rows" else m


def initial(count: int, sizes: Sequence[int], generator: torch.Generator) -> AmortisedParams:
    """Return random layers between so many channels, (count, outputs, inputs) and (count, outputs)."""
    pairs = list(pairwise(sizes))
    weights = (torch.randn(count, out, into, generator=generator) * (2 / into) ** 0.5 for into, out in pairs)
    return AmortisedParams(tuple(weights), tuple(torch.zeros(count, out) for _, out in pairs))
