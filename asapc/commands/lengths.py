"""Compares models with open axes, at other lengths than their samples', with what was found at those."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from asapc.capturing.capture import capture_code
from asapc.capturing.compare import run
from asapc.capturing.dynamic import node_names, open_axes
from asapc.errors import CaptureError, SamplesError
from asapc.passes.find.build import build_plans
from asapc.passes.find.evidence import find_with_evidence
from asapc.passes.find.probe import difference
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.graph import Axes, CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.options import EarlyStopRule
from asapc.types.samples import Samples
from asapc.types.site import Findings, Loop, Site
from asapc.types.teacher import Teacher

# Relative. The scale of a loop is read off in float64 from scores in float32.
SCALE_TOLERANCE = 1e-5
OUTPUT_TOLERANCE = 1e-3  # of outputs in float32, from loops of many half-steps
COMPARED = 2  # samples, at each length
HINT = "let the length scale or shift the scores before the loop and nothing else, or omit --dynamic"

Lengths = Mapping[str, int]  # of open axes, by name


def resized(samples: Samples, axes: Axes, lengths: Lengths) -> Samples:
    """Return samples whose open axes have other lengths: entries at equal distances are taken, or repeated.

    So padding stays padding, and keeps its share.
    """
    inputs = {}
    for name, value in samples.inputs.items():
        for number, axis in axes[name].items():
            if axis.name in lengths:
                length = lengths[axis.name]
                value = value.index_select(number, torch.arange(length) * value.shape[number] // length)
        inputs[name] = value
    return Samples(inputs)


def find_at_lengths(
    loaded: LoadedModel, samples: Samples, axes: Axes, graph: CapturedGraph, early_stop: EarlyStopRule
) -> Findings:
    """Find sites; with open axes, those whose loops are the same at another length too.

    A scale that follows the length is taken as part of the scores.

    Args:
        loaded: the model.
        samples: those that `graph` was captured with.
        axes: the open axes.
        graph: the model with the lengths of the samples, its plans built.
        early_stop: as of `capture_code`.

    Raises:
        CaptureError: a loop changes with the length, or the model cannot be captured, or does other operations.
    """
    first = findings = find_with_evidence(graph, samples)
    lengths = {name: axis.other for name, axis in open_axes(axes, samples).items()}
    if not first.sites or not lengths:
        return first
    others = resized(samples, axes, lengths)
    try:
        other = capture_code(loaded, others, early_stop)
    except SamplesError as error:
        raise too_far(lengths, error) from error
    other = build_plans(other, others)
    names = node_names(graph, other)
    skipped: set[str] = set()
    while True:
        twins = find_with_evidence(other, others, {names[node] for node in skipped})
        if not (following := starts_that_follow(findings, twins, names)):
            break
        skipped |= following
        findings = find_with_evidence(graph, samples, skipped)
    plans = {site.wiring.plan.node for site in findings.sites}
    for site in first.sites:
        if site.wiring.plan.node not in plans:
            raise CaptureError(f"the temperature of {site.name} ({site.source}) follows the length in its loop", HINT)
    loops = {site.wiring.plan.node: site.loop for site in twins.sites}
    sites = tuple(opened(site, loops[names[site.wiring.plan.node]]) for site in findings.sites)
    return replace(findings, sites=sites)


def opened(site: Site, twin: Loop) -> Site:
    """Return a site that says which of its sizes follow an open axis: those that are others at the other length.

    Raises:
        CaptureError: as of `open_heads`.
    """
    loop = site.loop
    site = site if loop.heads == twin.heads else open_heads(site)
    follow = (loop.queries, loop.keys) != (twin.queries, twin.keys)
    return replace(site, loop=replace(site.loop, open_lengths=follow))


def open_heads(site: Site) -> Site:
    """Return a site whose number of heads follows an open axis: a matrix for each token.

    Raises:
        CaptureError: it has one number of heads alone.
    """
    product, operands = site.wiring.product, site.wiring.operands
    scales = [site.loop.scale] if product is None else [site.loop.scale, product.score_scale]
    axes = [set(operand.axes) for operand in [*operands, site.wiring.result]]
    alike = any(all(letter in letters for letters in axes) for letter in "hzy") and site.wiring.groups == 1
    if not alike or not all(map(even, scales)):
        raise CaptureError(
            f"{site.name} ({site.source}) has as many heads as an open axis is long, and they differ from each other",
            "let all tokens share one temperature, and have samples and tokens on one axis from the scores to the "
            "values or on none, or omit --dynamic",
        )
    if product is not None:
        product = replace(product, score_scale=product.score_scale[:1], folded=product.folded[:1])
    return replace(
        site,
        loop=replace(site.loop, scale=site.loop.scale[:1]),
        wiring=replace(site.wiring, product=product),
    )


def even(scale: Tensor) -> bool:
    """Return whether all heads have one scale."""
    return torch.allclose(scale, scale[:1], rtol=SCALE_TOLERANCE)


def starts_that_follow(findings: Findings, others: Findings, names: Mapping[str, str]) -> set[str]:
    """Return the nodes of the scores of those loops whose scale changes with the length.

    Args:
        findings: at the one length.
        others: at the other.
        names: of nodes in the second graph by those in the first.

    Raises:
        CaptureError: a loop changes in anything else, or is missing at the other length.
    """
    twins = {site.wiring.plan.node: site for site in others.sites}
    following = set()
    for site in findings.sites:
        twin = twins.get(names[site.wiring.plan.node])
        if twin is None or not same(site.loop, twin.loop):
            raise CaptureError(f"the loop of {site.name} ({site.source}) changes with the length", HINT)
        heads = min(site.loop.heads, twin.loop.heads)
        if not torch.allclose(site.loop.scale[:heads], twin.loop.scale[:heads], rtol=SCALE_TOLERANCE):
            following.add(site.wiring.scores.node)
    return following


def same(one: Loop, other: Loop) -> bool:
    """Return whether two loops have the same half-steps and masses."""
    if not one.uniform:
        return True  # `dynamic.reopen` says why such a loop has one length
    if not other.uniform or (one.half_steps, one.last) != (other.half_steps, other.last):
        return False
    # The mass of the other axis matters up to a factor only, so that one number needs no comparison.
    last, twin = (loop.row_mass if loop.last == "rows" else loop.column_mass for loop in (one, other))
    return torch.allclose(last, twin, rtol=SCALE_TOLERANCE)


def too_far(lengths: Lengths, error: SamplesError) -> CaptureError:
    """Return the error for lengths that a model does not take."""
    return CaptureError(
        f"with {in_words(lengths)}, as --dynamic declares, {error}", "declare lengths that the model takes"
    )


def in_words(lengths: Lengths) -> str:
    """Format lengths for a message."""
    return ", ".join(f"{name}={length}" for name, length in lengths.items())


def check_lengths(teacher: Teacher, axes: Axes) -> None:
    """Compare the exact form of all sites with the model: at the ends of the open axes, and in between.

    Raises:
        CaptureError: they differ, or the model does not run at such a length.
    """
    operators = {site.name: exact_operator(site, wide=True) for site in teacher.open_sites}
    module = teacher.open_graph.program.module()
    exact = RewriteSinkhorn(teacher.open_sites, operators)(module).program
    stops = teacher.open_graph.early_stops
    # A loop that stops early is taken to its bound: the graph is what the model is by then.
    reference = teacher.loaded.module if stops is None else teacher.open_graph.program.module()
    ranges = open_axes(axes, teacher.calibration)
    for end in ("low", "between", "high"):
        lengths = {name: getattr(axis, end) for name, axis in ranges.items()}
        samples = resized(teacher.calibration[:COMPARED], axes, lengths)
        try:
            expected, actual = run(reference, samples, samples), run(exact, samples, samples)
        except SamplesError as error:
            raise too_far(lengths, error) from error
        errors = [difference(a, b) if a.shape == b.shape else 1.0 for a, b in zip(actual, expected, strict=True)]
        if errors and max(errors) > OUTPUT_TOLERANCE:
            raise CaptureError(
                f"with {in_words(lengths)}, as --dynamic declares, the outputs differ by {max(errors):.1%} from the "
                "model's: something in it follows the length",
                HINT,
            )
