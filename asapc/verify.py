"""Compares a compiled model with its teacher on held-out samples: site by site, hop by hop, end to end."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn

from asapc.artifacts import CapturedGraph, Samples, Site
from asapc.backends.base import Runner
from asapc.config import DEFAULT_BUDGET, SITE_METRICS, Bound
from asapc.errors import FidelityError, OptionError, SamplesError
from asapc.passes.layout import arrange, operands, score_factor, site_inputs
from asapc.passes.record import record
from asapc.results import Fidelity, Hop, Metric, SiteFidelity, VariantFidelity

BATCH = 32
# What can be done where a hop of the compilation costs too much.
HINTS = {
    "capture": "early stops are left out of a captured graph: train and evaluate the model with a fixed number of "
    "iterations; `--early-stop refuse` refuses such models before they are compiled, see docs/recognition.md",
    "amortisation": "loosen the budget, ask for the exact form with -O1, or keep the model as it is",
    "activations": "give --relu-activations a smaller error",
    "precision": "ask for another --precision: float32 costs nothing in fidelity",
    "export": "ONNX Runtime should compute what torch does: report the model, or loosen the budget",
}


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


def missed(fidelity: Fidelity, budget: Sequence[Bound]) -> list[Bound]:
    """Terms of a budget that a compiled model misses; without terms DEFAULT_BUDGET holds, as far as it can be judged.

    Raises:
        OptionError: a term of `budget` cannot be judged: agreement without classes, a metric without labels.
    """
    seen = seen_of(fidelity)
    terms = budget or [bound for bound in DEFAULT_BUDGET if seen[bound.metric] is not None]
    for bound in terms:
        if seen[bound.metric] is None:
            raise OptionError(
                f"the budget {bound} cannot be judged: the samples have no labels, or the output no classes",
                "add labels to the --calib file, or use a budget on relc",
            )
    return [bound for bound in terms if not bound.met(seen[bound.metric])]


def seen_of(fidelity: Fidelity) -> dict[str, Any]:
    """What each metric of a budget is for a compiled model, None where it cannot be judged."""
    metric = fidelity.metric
    return {
        "agreement": fidelity.agreement,
        "metric-drop": None if metric is None else 100 * (metric.teacher - metric.compiled),
        **{
            name: worst([getattr(site, field) for site in fidelity.sites.values()])
            for name, field in SITE_METRICS.items()
        },
    }


def check_budget(fidelity: Fidelity, budget: Sequence[Bound], cost: float | None = None) -> None:
    """Hold a compiled model against its budget; without terms DEFAULT_BUDGET holds, as far as it can be judged.

    Args:
        fidelity: of the model.
        budget: terms to keep.
        cost: what its operators take of the time of exact forms, as estimated, where that is known.

    Raises:
        FidelityError: a term is missed, or the output is not finite.
        OptionError: a term of `budget` cannot be judged: agreement without classes, a metric without labels.
    """
    broken = next((hop for hop in fidelity.hops if not isfinite(hop.rel)), None)
    if broken is not None or not isfinite(fidelity.logits_rel):
        step = f", from the step of {broken.name} on" if broken is not None and broken.name in HINTS else ""
        raise FidelityError(
            f"the compiled model gives NaN or infinity on held-out samples{step}",
            "ask for the exact form with -O1, and report the model",
        )
    for bound in missed(fidelity, budget):
        hop = blamed(fidelity, bound)
        step = f"; of all steps {hop.name} changes the outputs most, by {hop.rel:.1e} relative" if hop else ""
        step += "" if cost is None else f"; its operators take {cost:.0%} of the exact forms' time, as estimated"
        raise FidelityError(
            f"the closest model that could be had has {bound.metric} {seen_of(fidelity)[bound.metric]:.4g} on "
            f"{fidelity.samples} held-out samples, outside the budget {bound}{step}",
            HINTS[hop.name if hop else "amortisation"],
        )


def blamed(fidelity: Fidelity, bound: Bound) -> Hop | None:
    """The hop that changes the outputs most, where a missed term is about the outputs and the hops are known."""
    known = [hop for hop in fidelity.hops if hop.name in HINTS]
    return None if bound.metric in SITE_METRICS else max(known, key=lambda hop: hop.rel, default=None)


def worst(errors: Sequence[float]) -> float:
    """Largest error, 0 without any; nan is the worst of all, which `max` alone would miss."""
    return inf if any(isnan(error) for error in errors) else max(errors, default=0.0)


def site_fidelity(
    graph: CapturedGraph, sites: Sequence[Site], operators: Mapping[str, nn.Module], samples: Samples
) -> dict[str, SiteFidelity]:
    """Fidelity of each operator alone, on the teacher's own activations.

    Args:
        graph: the teacher.
        sites: its sites.
        operators: by the site's name; sites without one are left out.
        samples: held-out inputs.
    """
    found = candidate_fidelity(graph, sites, {name: {0: module} for name, module in operators.items()}, samples)
    return {name: of_site[0] for name, of_site in found.items()}


def candidate_fidelity(
    graph: CapturedGraph, sites: Sequence[Site], candidates: Mapping[str, Mapping[int, nn.Module]], samples: Samples
) -> dict[str, dict[int, SiteFidelity]]:
    """Fidelity of several operators for each site, each alone, in one pass; see `site_fidelity`."""
    sites = [site for site in sites if site.name in candidates]
    module = graph.program.module()
    names = {operand.node for site in sites for operand in (*operands(site), site.plan)}
    sums = {s.name: dict.fromkeys(candidates[s.name], torch.zeros(6, dtype=torch.float64)) for s in sites}
    for batch in samples.batches(BATCH):
        values = record(module, batch, names)
        for site in sites:
            for key, operator in candidates[site.name].items():
                sums[site.name][key] = sums[site.name][key] + site_errors(site, operator, values)
    return {name: {key: to_fidelity(*s.tolist()) for key, s in of_site.items()} for name, of_site in sums.items()}


def site_errors(site: Site, operator: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """Sums over a batch, its heads and its rows, see `to_fidelity`; masked rows and columns do not count."""
    given = [values[operand.node] for operand in operands(site)]
    scores, queries, keys, applied = site_inputs(site, given, score_factor(site, site.dtype))
    plan = arrange(values[site.plan.node].double(), site.plan.axes, "nm", site.groups, site.heads)
    with torch.no_grad():
        compiled_plan = operator(scores, queries, keys).double()
        compiled = compiled_plan if applied is None else operator(scores, queries, keys, applied).double()
    if site.logarithm:
        plan, compiled_plan, compiled = plan.exp(), compiled_plan.exp(), compiled.exp()
    live = plan > 0
    rows = live.any(dim=-1, keepdim=True)
    output = plan if applied is None else plan @ applied.double()
    centred = (output - (output * rows).sum(dim=-2, keepdim=True) / rows.sum(dim=-2, keepdim=True).clamp_min(1)) * rows
    wanted, mass = (p.sum(dim=-1, keepdim=True) for p in (plan, compiled_plan))
    columns = live.any(dim=-2, keepdim=True)
    count = columns.sum(dim=-1, keepdim=True).clamp_min(1)
    share = plan.sum(dim=(-1, -2), keepdim=True) / count
    column_mass = share if site.uniform else plan.sum(dim=-2, keepdim=True)
    off = torch.where(columns, (compiled_plan.sum(dim=-2, keepdim=True) / column_mass - 1).abs(), 0.0)
    off = off.sum(dim=-1, keepdim=True) / count
    typical = plan.sum(dim=-1).amax().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack(
        [
            ((compiled - output) * rows).square().sum(),
            centred.square().sum(),
            ((compiled_plan - plan) * rows).abs().sum() / 2 / typical,
            ((mass - wanted) * rows).abs().sum() / typical,
            (off * rows).sum(),
            rows.sum().double(),
        ]
    )


def to_fidelity(error: float, norm: float, tv: float, rows: float, columns: float, count: float) -> SiteFidelity:
    """Turn sums over samples, heads and rows into means."""
    relc = (error / norm) ** 0.5 if norm > 0 else float(error > 0)
    return SiteFidelity(relc, tv / count, rows / count, columns / count)


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
