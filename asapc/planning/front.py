"""Fronts: what nothing else beats in both cost and error, at one site and of the whole model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import hypot, inf, isnan

from asapc.types.choices import Candidate, Choice, Selection

# The error that a row of a model's front leaves of that of the row before: closer steps change little and take as long
# to check.
LEFT = 0.8


def relc(candidate: Candidate) -> float:
    """Return the error of a candidate's attention output; not finite counts as infinite."""
    value = inf if candidate.fidelity is None else candidate.fidelity.relc
    return inf if isnan(value) else value  # NaN would break every comparison of a sort


def front(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield the candidates that no cheaper or equally cheap one beats in error, cheapest first."""
    least = inf
    for candidate in sorted(candidates, key=lambda c: (c.cost, relc(c))):
        if relc(candidate) < least:
            least = relc(candidate)
            yield candidate


def next_step(choice: Choice) -> Candidate | None:
    """Return the next closer candidate on a site's front, None where there is none."""
    closer = [c for c in choice.front if c.cost > choice.candidate.cost and relc(c) < relc(choice.candidate)]
    return closer[0] if closer else None


def gain(now: Candidate, step: Candidate) -> float:
    """Return the squared error that a step removes for each millisecond that it costs."""
    return (relc(now) ** 2 - relc(step) ** 2) / (step.cost - now.cost)


def closer(selection: Selection, names: Sequence[str], reason: str) -> Selection | None:
    """Give one of some sites its next closer operator: where that removes most error for its cost.

    Args:
        selection: the operators so far.
        names: of the sites.
        reason: why the closer one was taken.

    Returns:
        The selection with it, one repair more; None where none of the sites has a closer operator.
    """
    steps = {name: step for name in names if (step := next_step(selection.choices[name])) is not None}
    if not steps:
        return None
    name = max(steps, key=lambda name: gain(selection.choices[name].candidate, steps[name]))
    choice = replace(selection.choices[name], candidate=steps[name], reason=reason)
    return replace(selection, choices={**selection.choices, name: choice}, repairs=selection.repairs + 1)


def model_front(cheapest: Selection, closest: Mapping[str, Choice], reason: str) -> list[Selection]:
    """List selections from the cheapest to the closest: each step is a closer operator at one site more.

    Args:
        cheapest: the cheapest operator at each site, with its front.
        closest: the operator to end with, by the site's name.
        reason: why a closer operator was taken.
    """
    rows, last = [cheapest], cheapest
    while (step := closer(last, list(cheapest.choices), reason)) is not None:
        if error(step) <= LEFT * error(rows[-1]):
            rows.append(step)
        last = step
    rows += [last] if rows[-1] is not last else []
    if any(rows[-1].choices[name].candidate is not choice.candidate for name, choice in closest.items()):
        rows.append(replace(rows[-1], choices=closest))  # loops that are kept are on no front: their cost is not known
    return rows


def error(selection: Selection) -> float:
    """Return what the errors of all sites add up to, as if they had nothing to do with each other."""
    return hypot(*(relc(choice.candidate) for choice in selection.choices.values()))
