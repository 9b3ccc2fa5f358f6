"""Holds a compiled model to its fidelity budget."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from asapc.errors import FidelityError, OptionError
from asapc.fidelity.outputs import worst
from asapc.types.budget import DEFAULT_BUDGET, SITE_METRICS, Bound, Term, Verdict
from asapc.types.results import Fidelity, Hop

# What to do where a hop of the compilation costs too much.
HINTS = {
    "capture": "early stops are left out of a captured graph: train and evaluate the model with a fixed number of "
    "iterations; `--early-stop refuse` refuses such models before they are compiled, see docs/recognition.md",
    "amortisation": "loosen the budget, ask for the exact form with -O1 unless you have it, or keep the model as it is",
    "activations": "give --relu-activations a smaller error",
    "precision": "ask for another --precision: float32 costs nothing in fidelity",
    "export": "ONNX Runtime should compute what torch does: report the model, or loosen the budget",
}


def judge(fidelity: Fidelity, budget: Sequence[Bound]) -> Verdict:
    """Judge the terms of a budget that are in force.

    Raises:
        OptionError: a term of `budget` cannot be judged: agreement without classes, a metric without labels.
    """
    values = reached(fidelity)
    terms = tuple(budget) or default_budget(fidelity)
    for bound in terms:
        if values[bound.metric] is None:
            raise OptionError(
                f"the budget {bound} cannot be judged: the samples have no labels, or the output no classes",
                "add labels to the --calib file, or use a budget on output-error or relc",
            )
    return Verdict(tuple(Term(bound, values[bound.metric]) for bound in terms))


def default_budget(fidelity: Fidelity) -> tuple[Bound, ...]:
    """Return the terms that hold where the user names none: of outputs by their classes, or else by their error."""
    of_outputs = "output-error" if fidelity.agreement is None else "agreement"
    return tuple(bound for bound in DEFAULT_BUDGET if bound.metric in (of_outputs, *SITE_METRICS))


def reached(fidelity: Fidelity) -> dict[str, Any]:
    """Return the metrics of a compiled model that a budget can name, None for one that cannot be judged.

    The difference that capture makes counts at the sites too: they are compared in the captured graph.
    """
    metric = fidelity.metric
    capture = next((hop.rel for hop in fidelity.hops if hop.name == "capture"), 0.0)
    return {
        "agreement": fidelity.agreement,
        "metric-drop": None if metric is None else 100 * (metric.teacher - metric.compiled),
        "output-error": worst(list(fidelity.outputs.values())),
        **{
            name: worst([getattr(site, field) for site in fidelity.sites.values()]) + capture
            for name, field in SITE_METRICS.items()
        },
    }


def check_budget(fidelity: Fidelity, budget: Sequence[Bound], cost: float | None = None) -> Verdict:
    """Hold a compiled model to its budget; without terms `default_budget` holds.

    Args:
        fidelity: of the model.
        budget: terms to keep.
        cost: estimated time of its operators over that of exact forms; None where it is not known.

    Raises:
        FidelityError: a term is missed, or the output is not finite.
        OptionError: a term of `budget` cannot be judged: agreement without classes, a metric without labels.
    """
    culprit = next((hop for hop in fidelity.hops if not isfinite(hop.rel)), None)
    if culprit is not None or not isfinite(fidelity.logits_rel):
        # The hop from the teacher to the compiled file, which `asapc verify` has alone, is no step of a compilation.
        step = f", from the step of {culprit.name} on" if culprit is not None and culprit.name in HINTS else ""
        raise FidelityError(
            f"FAILED: the compiled model returns NaN or infinity on some samples{step}",
            "ask for the exact form with -O1, and report the model",
        )
    verdict = judge(fidelity, budget)
    if not verdict.passed:
        hop = worst_hop(fidelity, verdict.missed[0].bound)
        step = f"; of all steps {hop.name} changes the outputs most, by {hop.rel:.1e} relative" if hop else ""
        step += "" if cost is None else f"; its operators take {cost:.0%} of the exact forms' time, as estimated"
        closest = " and ".join(str(term.tightest) for term in verdict.missed)
        raise FidelityError(
            f"FAILED: {verdict.told}, on {fidelity.samples} samples; {closest} would have passed{step}",
            HINTS[hop.name if hop else "amortisation"],
        )
    return verdict


def worst_hop(fidelity: Fidelity, bound: Bound) -> Hop | None:
    """Return the hop that changes the outputs most; None where the term is about sites, or there are no hops."""
    hops = [hop for hop in fidelity.hops if hop.name in HINTS]
    # A site is compared on the teacher's own activations, so that no other step has a part in its error.
    return None if bound.metric in SITE_METRICS else max(hops, key=lambda hop: hop.rel, default=None)
