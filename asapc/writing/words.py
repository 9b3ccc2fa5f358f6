"""What a report calls operators and what it says in sentences, on the terminal and on a page alike."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


def reached(term: Mapping[str, Any]) -> str:
    """Return what a model reached of a term of its budget."""
    return "not finite" if term["reached"] is None else f"{term['reached']:.4g}"


def kinds(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how many sites have operators of which kind."""
    counts = Counter(kind(site) for site in sites.values())
    return ", ".join(f"{count}x {name}" if count > 1 else name for name, count in counts.items())


def kind(candidate: Mapping[str, Any]) -> str:
    """Name an operator in few words, with its half-steps where they vary."""
    if candidate["operator"] in ("exact", "keep"):
        return str(candidate["operator"])
    if candidate["operator"] == "sliced_dual" and candidate["half_steps"] == 1:
        return "one pass"
    duals = "sorted dual" if candidate["slices"] else "dual"
    name = duals if candidate["operator"] == "sliced_dual" else candidate["operator"]
    return f"{name} {candidate['half_steps']}"


def label(candidate: Mapping[str, Any]) -> str:
    """Name an operator and what sets it apart."""
    more = [f"{candidate['slices']} slices"] if candidate["slices"] else []
    more += ["hinges"] if "hinges" in candidate["features"] else []
    more += [candidate["side"]] if candidate["side"] else []
    more += [f"{candidate['width']} wide"] if candidate["width"] else []
    more += [] if candidate["lowering"] == "materialised" else [candidate["lowering"]]
    return ", ".join([candidate["operator"], *more])


def output_errors(fidelity: Mapping[str, Any]) -> str:
    """Return a line on how much each output differs from the teacher's, the worst first."""
    worst_first = sorted(fidelity["outputs"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} by {error:.2%}" for name, error in worst_first[:4])
    more = f" and {len(worst_first) - 4} more by less" if len(worst_first) > 4 else ""
    return f"outputs differ from the teacher's: {shown}{more}"


def cheaper_note(data: Mapping[str, Any]) -> str:
    """Return a line on the next cheaper selection and the terms of the budget that it misses; empty without any."""
    cheaper = data["cheaper"]
    if cheaper is None:
        return ""
    times = [site["choice"]["estimated_ms"] for site in data["sites"]]
    ms = "" if None in times else f" in place of {sum(times):.2f}"
    where = f"at {next(iter(cheaper['sites']))}" if len(cheaper["sites"]) == 1 else f"at {len(cheaper['sites'])} sites"
    kept = "" if cheaper["margin"] == 1 else f", of which {cheaper['margin']:.0%} may be used"
    missed = ", ".join(f"{t['term']}{kept}, with {number(t['reached'])}" for t in cheaper["missed"])
    cost = f"{number(cheaper['estimated_ms'], '.2f')} ms{ms} by estimate"
    return (
        f"the next cheaper, {kinds(cheaper['sites'])} {where}, would take {cost} and misses {missed} on "
        f"{cheaper['samples']} samples"
    )


def cost_check(costs: Mapping[str, Any]) -> str:
    """Return a line on the costs that the planner read, and how far they were from what was measured."""
    head = f"Costs: {costs['model']}, {costs['device']}"
    if costs["reason"] is not None:
        return f"{head}; not compared with what was measured: {costs['reason']}"
    return (
        f"{head}; at batch {costs['batch']} operators add {costs['measured_ms']:.2f} ms to softmax attention, by "
        f"estimate {costs['estimated_ms']:.2f}"
    )


def number(value: float | None, form: str = ".3g") -> str:
    """Format a number, one that is not known or not finite in words."""
    return "no finite number" if value is None else format(value, form)


def outside_share(site: Mapping[str, Any]) -> str:
    """Return the share of a site's plans whose scores spread beyond its calibration, as a cell of a table."""
    if site["outside"] is None:
        return "any scores do"
    return f"{site['outside_calibration']:.1%}" + (" (shifted)" if site["shifted"] else "")


def outside_note(site: Mapping[str, Any], samples: int) -> str:
    """Return a line on the plans of a site whose scores spread beyond its calibration; empty without any."""
    outside = site["outside"]
    if outside is None or not outside["count"]:
        return ""
    own = outside["plans"] > samples  # each token of a sample has a plan of its own
    places = ", ".join(f"sample {sample}" + (f" plan {plan}" if own else "") for sample, plan in outside["places"])
    more = ", ..." if outside["count"] > len(outside["places"]) else ""
    return (
        f"{site['name']}: the scores of {outside['count']:,} of {outside['plans']:,} {'plans' if own else 'samples'} "
        f"spread less or more than any in calibration: {places}{more}"
    )
