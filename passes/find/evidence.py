"""Chooses the samples that the finder looks at: few, since it is thorough, and such that they tell what a loop does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.find.sinkhorn import find_sinkhorn, is_same_everywhere
from asapc.passes.record import record
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Findings

MAX_SAMPLES, BATCH = 256, 32  # that many are looked through, where two do not tell enough


def find_with_evidence(graph: CapturedGraph, samples: Samples) -> Findings:
    """`find_sinkhorn` on two of many samples, and on some more where a loop reads what is the same on these two.

    A mask that the model makes itself, of token ids say, shows nowhere but in the values of the graph.
    """
    chosen = most_different(samples)
    findings = find_sinkhorn(graph, samples[chosen])
    more = telling(graph, findings.untold, samples)
    return find_sinkhorn(graph, samples[[*chosen, *more]]) if more else findings


def most_different(samples: Samples) -> list[int]:
    """Two samples: those with the least and the most padding, as far as masks among the inputs tell.

    Which value of a mask stands for padding is not known, but a sample that has both is neither without padding nor
    wholly masked. Such samples are taken where there are two.
    """
    share, mixed = torch.zeros(len(samples)), torch.zeros(len(samples))
    for value in samples.inputs.values():
        of_input = marks(value).reshape(len(samples), -1).float().mean(dim=1)
        share += of_input
        mixed += (of_input > 0) & (of_input < 1)
    best = max(2, int((mixed == mixed.max()).sum()))
    chosen = mixed.argsort(descending=True, stable=True)[:best]
    chosen = chosen[share[chosen].argsort(stable=True)]
    return [int(chosen[0]), int(chosen[-1])]


def marks(value: Tensor) -> Tensor:
    """Where an input says something that masks say: true, or 0 among integers or among zeros and ones, or -1e4."""
    if value.dtype == torch.bool:
        return value
    if not value.is_floating_point() or bool(((value == 0) | (value == 1)).all()):
        return value == 0
    return value < MIN_LIVE


def telling(graph: CapturedGraph, names: Sequence[str], samples: Samples) -> list[int]:
    """For each named node two samples on which it is not the same everywhere; none where there are no such."""
    module = graph.program.module()
    numbers: list[int] = []

    def differs(name: str, part: list[int]) -> bool:
        return len(part) > 1 and not is_same_everywhere(record(module, samples[part], [name])[name])

    for name in names:
        if differs(name, numbers):
            continue
        indices = list(range(len(samples)))[:MAX_SAMPLES]
        parts = (indices[start : start + BATCH] for start in range(0, len(indices), BATCH))
        part = next((part for part in parts if differs(name, part)), [])
        while len(part) > 2:
            one, other = part[: len(part) // 2], part[len(part) // 2 :]
            # Where it differs within neither half it does so between them.
            part = next((half for half in (one, other) if differs(name, half)), [one[0], other[0]])
        numbers += part
    return numbers
