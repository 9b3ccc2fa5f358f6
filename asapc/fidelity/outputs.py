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
    batch_size: int = BATCH,
) -> Fidelity:
    """Run everything on held-out samples and compare.

    Args:
        hops: the model as loaded, then the model after each step of the compilation, in order; each is
            compared with the one before, the last with the first as well.
        variants: other ways to run the model, each compared with the model as loaded.
        sites: the result of `site_fidelity`.
        samples: held-out samples, with labels where there are any.
        batch_size: samples at once.
    """
    names = list(hops)
    firsts: dict[str, Tensor] = {}
    # Of other outputs only sums are kept: they may be the maps of all layers.
    sums: dict[tuple[str, str], Tensor] = {}
    end_to_end = names[0], names[-1]
    floating_names: list[str] = []
    for batch in samples.batches(batch_size):
        raw = {name: runner(batch) for name, runner in hops.items()}
        outputs = {name: floating(of_hop) for name, of_hop in raw.items()}
        floating_names = floating_names or output_names(hops[names[-1]], raw[names[-1]])
        for name in names:
            firsts[name] = torch.cat([*([firsts[name]] if name in firsts else []), outputs[name][0]])
        for pair in {end_to_end, *pairwise(names)}:
            before, after = pair
            of_batch = torch.stack([errors(*both) for both in zip(outputs[before], outputs[after], strict=True)])
            sums[pair] = add_errors(sums[pair], of_batch) if pair in sums else of_batch
    teacher, compiled = firsts[names[0]], firsts[names[-1]]
    labelled = samples.labels is not None
    total = compare("total", teacher, compiled, labelled)

    return Fidelity(
        samples=len(samples),
        logits_rel=total.rel,
        agreement=total.agreement,
        metric=metric(teacher, compiled, samples.labels),
        outputs=dict(zip(floating_names, relative_errors(sums[end_to_end]), strict=True)),
        hops=tuple(
            to_hop(after, sums[before, after], agreement(firsts[before], firsts[after], labelled))
            for before, after in pairwise(names)
        ),
        variants={
            name: variant_fidelity(teacher, first_output(runner, samples, batch_size), samples.labels)
            for name, runner in variants.items()
        },
        sites=sites,
    )


def variant_fidelity(teacher: Tensor, output: Tensor, labels: Tensor | None) -> VariantFidelity:
    """Compare the first output of a variant with the teacher's."""
    total, accuracies = compare("total", teacher, output, labels is not None), metric(teacher, output, labels)
    return VariantFidelity(
        logits_rel=total.rel if isfinite(total.rel) else None,  # JSON has no infinity
        agreement=total.agreement,
        metric=None if accuracies is None else accuracies.compiled,
    )


def worst(errors: Sequence[float]) -> float:
    """Return the largest error, 0 without any; NaN is the worst of all, which `max` alone would miss."""
    return inf if any(isnan(error) for error in errors) else max(errors, default=0.0)


def floating(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return those outputs of a model that are floating, all where none is, in float64."""
    return [output.double() for output in outputs if output.is_floating_point()] or [o.double() for o in outputs]


def first_output(runner: Runner, samples: Samples, batch_size: int = BATCH) -> Tensor:
    """Return the first floating output on all samples, (samples, ...): the logits, where it is a classifier."""
    return torch.cat([floating(runner(batch))[0] for batch in samples.batches(batch_size)])


def errors(reference: Tensor, candidate: Tensor) -> Tensor:
    """Compare two outputs; entries that are not finite differ infinitely, unless both are the same.

    Returns:
        (4,): squared norms of the difference and of the reference, number of finite entries, and largest difference.
    """
    # Models do return such entries: a masked score is -inf, and a mean over a sample that is all padding is NaN.
    same = (candidate == reference) | (candidate.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, candidate - reference).nan_to_num(nan=inf, posinf=inf, neginf=-inf)
    finite = reference.isfinite()
    norm = torch.where(finite, reference, 0.0).square().sum()
    return torch.stack([difference.square().sum(), norm, finite.sum(), difference.abs().max()])


def add_errors(one: Tensor, other: Tensor) -> Tensor:
    """Combine the `errors` of two batches, for each output: (outputs, 4)."""
    return torch.cat([one[:, :3] + other[:, :3], torch.maximum(one[:, 3:], other[:, 3:])], dim=1)


def to_hop(name: str, rows: Tensor, agree: float | None) -> Hop:
    """Make a hop of the `errors` of all outputs, of which the worst counts."""
    return Hop(name, max_abs=worst(rows[:, 3].tolist()), rel=worst(relative_errors(rows)), agreement=agree)


def relative_errors(rows: Tensor) -> list[float]:
    """Return the relative error of each output from their `errors`."""
    return [relative_error(difference, norm, finite) for difference, norm, finite, _ in rows.tolist()]


def output_names(runner: Runner, outputs: Sequence[Tensor]) -> list[str]:
    """Return the names of the outputs that `floating` keeps, by their number where the runtime knows none."""
    names = getattr(runner, "outputs", None) or [f"output {number}" for number in range(len(outputs))]
    return [name for name, output in zip(names, outputs, strict=True) if output.is_floating_point()] or names


def relative_error(difference: float, norm: float, finite: float) -> float:
    """Return the relative error of an output, from squared norms and its number of finite entries."""
    if norm:
        error: float = (difference / norm) ** 0.5
        return error
    # An output of zeros has no scale, and one without a finite entry tells nothing.
    return inf if difference or not finite else 0.0


def compare(name: str, reference: Tensor, candidate: Tensor, labelled: bool = False) -> Hop:
    """Compare two models' first outputs; with labels any last axis is one of classes."""
    return to_hop(name, errors(reference, candidate).unsqueeze(0), agreement(reference, candidate, labelled))


def agreement(reference: Tensor, candidate: Tensor, labelled: bool) -> float | None:
    """Return the share of equal classes, None where there are no classes."""
    # Without labels, the last of three axes or more is mostly one of features.
    classes = reference.dim() == 2 or (labelled and reference.dim() > 2)
    return accuracy(candidate, reference.argmax(dim=-1)) if classes and reference.shape[-1] > 1 else None


def check_labels(teacher: Runner, *parts: Samples) -> None:
    """Raise SamplesError where labels are not classes of the model."""
    output = first_output(teacher, parts[0][:1])
    of_parts = [samples.labels for samples in parts if samples.labels is not None]
    if not of_parts or not has_classes(output):
        return
    classes, labels = output.shape[-1], torch.cat(of_parts)
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise SamplesError(
            f"labels run from {labels.min().item()} to {labels.max().item()}, the model tells {classes} classes apart",
            f"give labels from 0 to {classes - 1}, and omit samples without one",
        )


def metric(teacher: Tensor, compiled: Tensor, labels: Tensor | None) -> Metric | None:
    """Compute the accuracy of both models, where there are labels and each sample has one class."""
    if labels is None or not has_classes(teacher):
        return None
    return Metric("accuracy", accuracy(teacher, labels), accuracy(compiled, labels))


def has_classes(output: Tensor) -> bool:
    """Return whether the output is (samples, classes): labels are one a sample."""
    return output.dim() == 2 and output.shape[1] > 1


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose largest logit is that of their label."""
    return (logits.argmax(dim=-1) == labels).double().mean().item()
