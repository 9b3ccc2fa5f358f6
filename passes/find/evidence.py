"""Chooses the samples that the finder looks at: few, since it is thorough, and such that they show what a loop does."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.find.requirements import is_same_in_all
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.record import record
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Findings

MAX_SAMPLES, BATCH = 256, 32  # samples searched where two do not show enough, and how many at once


def find_with_evidence(graph: CapturedGraph, samples: Samples, skipped: Collection[str] = ()) -> Findings:
    """Run `find_sinkhorn` on two samples, and again on more where a loop reads what does not vary on these two.

    A mask that the model computes itself, from token ids say, shows only in the values of the graph.
    """
    pair = most_different(samples)
    findings = find_sinkhorn(graph, samples[pair], skipped)
    more = varying(graph, findings.untold, samples)
    return find_sinkhorn(graph, samples[[*pair, *more]], skipped) if more else findings


def most_different(samples: Samples) -> list[int]:
    """Return the indices of the samples with the least and the most padding, as far as masks among the inputs show.

    Which value of a mask stands for padding is unknown. But a sample that has both values is neither without padding
    nor wholly masked: where two such samples exist, the choice is among them.
    """
    share, mixed = torch.zeros(len(samples)), torch.zeros(len(samples))
    for value in samples.inputs.values():
        fraction = marks(value).reshape(len(samples), -1).float().mean(dim=1)
        share += fraction
        mixed += (fraction > 0) & (fraction < 1)
    best = max(2, int((mixed == mixed.max()).sum()))
    order = mixed.argsort(descending=True, stable=True)[:best]
    order = order[share[order].argsort(stable=True)]
    return [int(order[0]), int(order[-1])]


def marks(value: Tensor) -> Tensor:
    """Return where an input looks like a mask: true, 0 among integers or among zeros and ones, or very negative."""
    if value.dtype == torch.bool:
        return value
    if not value.is_floating_point() or bool(((value == 0) | (value == 1)).all()):
        return value == 0
    return value < MIN_LIVE


def varying(graph: CapturedGraph, names: Sequence[str], samples: Samples) -> list[int]:
    """Return indices of samples: for each named node two on which it is not constant, where such exist."""
    module, size = graph.program.module(), max(2, graph.samples_at_once(BATCH))
    nodes = {node.name: node for node in module.graph.nodes}
    numbers: list[int] = []

    def varies(name: str, part: list[int]) -> bool:
        return len(part) > 1 and not is_same_in_all(nodes[name], record(module, samples[part], [name])[name])

    for name in names:
        if varies(name, numbers):  # on the samples of an earlier node
            continue
        indices = list(range(len(samples)))[:MAX_SAMPLES]
        parts = (indices[start : start + size] for start in range(0, len(indices), size))
        part = next((part for part in parts if varies(name, part)), [])
        while len(part) > 2:
            one, other = part[: len(part) // 2], part[len(part) // 2 :]
            # Where it varies within neither half it varies between them.
            part = next((half for half in (one, other) if varies(name, half)), [one[0], other[0]])
        numbers += part
    return numbers
