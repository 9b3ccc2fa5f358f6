"""Captures models, and replaces each site that the finder recognises by the exact operator."""

from pathlib import Path

import torch
from helpers.tolerances import difference
from torch import Tensor
from torch.utils._pytree import tree_leaves

from asapc.capturing.capture import capture_code
from asapc.capturing.export import export
from asapc.passes.find.build import build_plans
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples

PROBED = 2  # samples that the finder sees


def captured(module, inputs):
    """The graph of a module, as `asapc compile` looks into it: early stops are taken to their bound, plans built."""
    loaded = LoadedModel(module, Path("model.pt"), sha256="", parameters=0, calibration=None, held_out=None)
    return build_plans(capture_code(loaded, Samples(inputs)), Samples(inputs)[:PROBED])


def relowered(graph, sites, inputs, exported=True):
    """The graph with the exact operator at every site, as a module."""
    operators = {site.name: exact_operator(site) for site in sites}
    rewritten = RewriteSinkhorn(sites, operators)(graph.program.module())
    assert rewritten.modified == bool(sites)
    return export(rewritten.program, Samples(inputs)[:PROBED].inputs).module() if exported else rewritten.program


def outputs(module, inputs):
    with torch.no_grad():
        # Cloned, since some models write to what they are given.
        result = module(*(value.clone() for value in inputs.values()))
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def worst(actual, expected):
    """The largest relative error of any output."""
    return max(difference(a, b) for a, b in zip(actual, expected, strict=True))


def examined(module, inputs, *others):
    """What is found in a module, and the largest difference that the exact operators make on other inputs."""
    graph = captured(module, inputs)
    findings = find_sinkhorn(graph, Samples(inputs)[:PROBED])
    if not findings.sites:
        return findings, 0.0
    original, changed = graph.program.module(), relowered(graph, findings.sites, inputs, exported=False)
    return findings, max(worst(outputs(changed, other), outputs(original, other)) for other in others)
