"""Judges what the finder makes of random models: on fresh inputs, at other scales and in other company.

Scores are scaled by scaling the inputs by the root: they are products of two. Biases that are learned stay.
"""

import random
from dataclasses import dataclass

import torch
from helpers.compositions import Composed, inputs_of, pick
from helpers.relowering import PROBED, captured, outputs

from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.samples import Samples

SCALES = (0.1, 1.0, 3.0, 10.0, 30.0)  # of the scores, against those that the finder sees
WRONG = 1e-4  # relative; rounding in float64 stays far below
# Scores of a matrix that lie farther apart leave the range of float64 in loops that are not in the log domain.
MAX_RANGE = 250.0


@dataclass(frozen=True)
class Verdict:
    """What became of one model.

    Attributes:
        kind: "refused", "right" or "wrong".
        sites: half-steps and last axis of each.
        scale: the first at which an output differs; None where none does.
        difference: the largest relative one.
        beyond: the same of inputs on which the model's own form leaves the range of float64; these count for nothing.
        reasons: why what looked like attention was refused.
    """

    kind: str
    sites: tuple[tuple[int, str], ...] = ()
    scale: float | None = None
    difference: float = 0.0
    beyond: float = 0.0
    reasons: tuple[str, ...] = ()


def drawn(number, seed=0):
    """Random model `number` of a seed: true loops and near-misses in turn."""
    generator = random.Random(f"{seed}-{number}")
    return pick(generator, poisoned=bool(number % 2))


def judged(composition):
    """Capture a model, find its loops in two samples, and compare the exact operators with the model itself."""
    torch.manual_seed(composition.seed)
    module = Composed(composition).double().eval()
    samples = Samples(double(inputs_of(composition, PROBED, composition.seed + 1, composition.padding_seen)))
    graph = captured(module, samples.inputs)
    findings = find_sinkhorn(graph, samples)
    if not findings.sites:
        return Verdict("refused", reasons=tuple(miss.reason for miss in findings.misses))
    exact = {site.name: exact_operator(site, wide=True) for site in findings.sites}
    changed = RewriteSinkhorn(findings.sites, exact)(graph.program.module()).program
    first, largest, beyond = None, 0.0, 0.0
    for scale in SCALES:
        for inputs in companies(composition, scale):
            error = difference(outputs(changed, inputs), outputs(module, inputs))
            if not in_range(module, inputs):
                beyond = max(beyond, error)
                continue
            largest = max(largest, error)
            if error > WRONG and first is None:
                first = scale
    kind = "right" if first is None else "wrong"
    sites = tuple((site.loop.half_steps, site.loop.last) for site in findings.sites)
    return Verdict(kind, sites, first, largest, beyond)


def companies(composition, scale):
    """Fresh inputs: five samples, the same in another order, two of them, and one alone."""
    five = double(inputs_of(composition, 5, seed=1005))
    for name in five.keys() & {"x", "context"}:
        five[name] = scale**0.5 * five[name]
    for order in (range(5), (3, 0, 4, 1, 2), (3, 4), (4,)):
        yield {name: value[list(order)] for name, value in five.items()}


def difference(actual, expected):
    """The largest relative error of any output, where what is expected is finite."""
    errors = [0.0]
    for a, b in zip(actual, expected, strict=True):
        finite = b.isfinite()
        size = b[finite].norm().item()
        if size < float("inf"):
            error = (a[finite] - b[finite]).norm().item() / (size or 1.0)
            errors.append(error if error == error else float("inf"))
    return max(errors)


def in_range(module, inputs):
    """Whether a model's kernel, and the vectors that scale it, stay within float64."""
    if module.c.in_log_domain:
        return True
    x = inputs["x"]
    with torch.no_grad():
        scores = module.scores(x, inputs.get("context", x))
    return (scores.max() - scores.min()).item() < MAX_RANGE


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
