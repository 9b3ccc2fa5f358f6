"""Compares a compiled model with its teacher on held-out samples: site by site, hop by hop, end to end."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf, isfinite, isnan

import torch
from torch import Tensor

from asapc.backends.base import Runner
from asapc.errors import SamplesError
from asapc.types.results import Fidelity, Hop, Metric, SiteFidelity, VariantFidelity
from asapc.types.samples import Samples

BATCH = 32


def verify(
    hops: Mapping[str, Runner],
    variants: Mapping[str, Runner],
    sites: Mapping[str, SiteFidelity],
    samples: Samples,
) -> Fidelity:
    """Run everything on held-out samples and compare.

    Args:
        hops: the model as loaded, then the model after each step of the compilation, in order; each is
            compared with the one before, the last with the first as well.
        variants: other ways to run the model, each compared with the model as loaded.
        sites: what `site_fidelity` gave.
        samples: held-out samples, with labels where there are any.
    """
    names = list(hops)
    firsts: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}  # no more is kept of other outputs, which may be the maps of all layers
    for batch in samples.batches(BATCH):
        outputs = {name: floating_outputs(runner, batch) for name, runner in hops.items()}
        for name in names:
            firsts[name] = torch.cat([*([firsts[name]] if name in firsts else []), outputs[name][0]])
        for before, after in pairwise(names):
            found = torch.stack([errors(*pair) for pair in zip(outputs[before], outputs[after], strict=True)])
            sums[after] = add_errors(sums[after], found) if after in sums else found
    teacher, compiled = firsts[names[0]], firsts[names[-1]]
    labelled = samples.labels is not None
    total = compare("total", teacher, compiled, labelled)

    def variant(output: Tensor) -> VariantFidelity:
        hop, scored = compare("total", teacher, output, labelled), metric(teacher, output, samples.labels)
        return VariantFidelity(
            logits_rel=hop.rel if isfinite(hop.rel) else None,
            agreement=hop.agreement,
            metric=None if scored is None else scored.compiled,
        )

    return Fidelity(
        samples=len(samples),
        logits_rel=total.rel,
        agreement=total.agreement,
        metric=metric(teacher, compiled, samples.labels),
        hops=tuple(
            to_hop(after, sums[after], agreement(firsts[before], firsts[after], labelled))
            for before, after in pairwise(names)
        ),
        variants={name: variant(first_output(runner, samples)) for name, runner in variants.items()},
        sites=sites,
    )


def worst(errors: Sequence[float]) -> float:
    """Largest error, 0 without any; nan is the worst of all, which `max` alone would miss."""
    return inf if any(isnan(error) for error in errors) else max(errors, default=0.0)


def floating_outputs(runner: Runner, batch: Samples) -> list[Tensor]:
    """Outputs of a model for one batch in float64, those of other types left out unless there are no floating ones."""
    outputs = runner(batch)
    return [output.double() for output in outputs if output.is_floating_point()] or [o.double() for o in outputs]


def first_output(runner: Runner, samples: Samples) -> Tensor:
    """First floating output of the model on all samples, (samples, ...): the logits, where it is a classifier."""
    return torch.cat([floating_outputs(runner, batch)[0] for batch in samples.batches(BATCH)])


def errors(reference: Tensor, candidate: Tensor) -> Tensor:
    """Squared norms of the difference and of the reference, how many entries are finite, and the largest difference.

    What is not finite differs infinitely, but where both are the same: a masked score is -inf, and a mean over a sample
    that is padding altogether NaN.
    """
    same = (candidate == reference) | (candidate.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, candidate - reference).nan_to_num(nan=inf, posinf=inf, neginf=-inf)
    finite = reference.isfinite()
    norm = torch.where(finite, reference, 0.0).square().sum()
    return torch.stack([difference.square().sum(), norm, finite.sum(), difference.abs().max()])


def add_errors(one: Tensor, other: Tensor) -> Tensor:
    """What `errors` says of two batches together, for each output: (outputs, 4)."""
    return torch.cat([one[:, :3] + other[:, :3], torch.maximum(one[:, 3:], other[:, 3:])], dim=1)


def to_hop(name: str, found: Tensor, agree: float | None) -> Hop:
    """A hop from the `errors` of all outputs, the worst of which counts; one without a finite entry tells nothing."""
    rows = found.tolist()
    relative = [(off / norm) ** 0.5 if norm else (inf if off or not finite else 0.0) for off, norm, finite, _ in rows]
    return Hop(name, max_abs=worst(found[:, 3].tolist()), rel=worst(relative), agreement=agree)


def compare(name: str, reference: Tensor, candidate: Tensor, labelled: bool = False) -> Hop:
    """The difference between two models' first outputs; with labels any last axis is one of classes."""
    return to_hop(name, errors(reference, candidate).unsqueeze(0), agreement(reference, candidate, labelled))


def agreement(reference: Tensor, candidate: Tensor, labelled: bool) -> float | None:
    """Share of equal classes, None where there are none: the last of three axes is mostly one of features."""
    classes = reference.dim() == 2 or (labelled and reference.dim() > 2)
    return accuracy(candidate, reference.argmax(dim=-1)) if classes and reference.shape[-1] > 1 else None


def check_labels(teacher: Runner, *parts: Samples) -> None:
    """Raise SamplesError where labels are not among the classes that the model tells apart."""
    output = first_output(teacher, parts[0][:1])
    labels = [samples.labels for samples in parts if samples.labels is not None]
    if not labels or not has_classes(output):
        return
    classes, given = output.shape[-1], torch.cat(labels)
    if not bool(((given >= 0) & (given < classes)).all()):
        raise SamplesError(
            f"labels run from {given.min().item()} to {given.max().item()}, the model tells {classes} classes apart",
            f"give labels from 0 to {classes - 1}, and leave out samples without one",
        )


def metric(teacher: Tensor, compiled: Tensor, labels: Tensor | None) -> Metric | None:
    """Accuracy of both models where there are labels, and classes of whole samples to hold against them."""
    if labels is None or not has_classes(teacher):
        return None
    return Metric("accuracy", accuracy(teacher, labels), accuracy(compiled, labels))


def has_classes(output: Tensor) -> bool:
    """Whether the output is (samples, classes), as labels are one a sample."""
    return output.dim() == 2 and output.shape[1] > 1


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of equal classes."""
    return (logits.argmax(dim=-1) == labels).double().mean().item()
