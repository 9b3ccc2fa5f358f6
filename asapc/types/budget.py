"""The fidelity budget: its metrics and terms, and how to read one."""

import re
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

from asapc.errors import OptionError

METRICS = {
    "agreement": ">=",
    "metric-drop": "<=",
    "output-error": "<=",
    "relc": "<=",
    "column-marginal": "<=",
}
# Those that are judged site by site, with the field of `types.results.SiteFidelity`.
SITE_METRICS = {"relc": "relc", "column-marginal": "column_marginal_error"}


class Bound(NamedTuple):
    """One term of a fidelity budget; `metric-drop` in percentage points, all else in natural units."""

    metric: str
    limit: float

    def met(self, value: float) -> bool:
        """Return whether a value keeps this term; NaN never does."""
        return value >= self.limit if METRICS[self.metric] == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.metric}{METRICS[self.metric]}{self.limit:g}"


@dataclass(frozen=True)
class Term:
    """A term of a budget, and what a model reached."""

    bound: Bound
    reached: float

    @property
    def met(self) -> bool:
        """Whether the model keeps it."""
        return self.bound.met(self.reached)

    @property
    def tightest(self) -> Bound:
        """The closest term that the model keeps, to three digits or more."""
        if not self.reached or not isfinite(self.reached):
            return Bound(self.bound.metric, self.reached)
        unit = 10.0 ** (floor(log10(abs(self.reached))) - 2)
        outward = floor if METRICS[self.bound.metric] == ">=" else ceil
        return Bound(self.bound.metric, float(f"{outward(round(self.reached / unit, 9)) * unit:.12g}"))


@dataclass(frozen=True)
class Verdict:
    """The terms of a budget that were in force, judged."""

    terms: tuple[Term, ...]

    @property
    def passed(self) -> bool:
        """Whether all are met."""
        return all(term.met for term in self.terms)

    @property
    def missed(self) -> list[Term]:
        """The terms that are not."""
        return [term for term in self.terms if not term.met]

    @property
    def told(self) -> str:
        """What was reached of each term, missed ones first."""
        terms = [*self.missed, *(term for term in self.terms if term.met)]
        marks = {True: "", False: " missed"}
        return ", ".join(f"{term.bound.metric} {term.reached:.4g} ({term.bound}{marks[term.met]})" for term in terms)

    @property
    def headline(self) -> str:
        """Whether the budget is kept, in one line with what was reached."""
        return f"{'PASSED' if self.passed else 'FAILED'}: {self.told}"


def parse_bound(text: str) -> Bound:
    """Read one term of a fidelity budget, e.g. "agreement>=0.99".

    Raises:
        OptionError: not of that form, an unknown metric, the comparison points the wrong way, or a limit that no model
            can miss or none can keep.
    """
    match = re.fullmatch(r"\s*([a-z-]+)\s*(>=|<=)\s*([0-9.eE+-]+)\s*(%?)\s*", text)
    terms = ", ".join(f"{name}{op}VALUE" for name, op in METRICS.items())
    # Bash turns an unquoted agreement>=0.99 into "agreement", and its output into a file named "=0.99".
    hint = f"use one of {terms}, in quotes since shells redirect at > and <: --fidelity 'agreement>=0.99'"
    if match is None or METRICS.get(match[1]) != match[2]:
        raise OptionError(f"cannot read the fidelity budget {text!r}", hint)
    try:
        limit = float(match[3])
    except ValueError:
        raise OptionError(f"{match[3]!r} in the fidelity budget {text!r} is not a number", hint) from None
    metric, percent = match[1], bool(match[4])
    if metric == "metric-drop":
        if not abs(limit) <= 100 or percent:
            raise OptionError(
                f"the fidelity budget {text!r} cannot be: a drop is between -100 and 100 percentage points",
                "give points without a sign, metric-drop<=0.5 for half a point",
            )
    elif not 0 <= limit <= 1 or percent:
        meant = limit / 100 if 1 < limit <= 100 or percent else None
        raise OptionError(
            f"the fidelity budget {text!r} cannot be: {metric} is between 0 and 1",
            hint if meant is None else f"give {Bound(metric, meant)} if you mean {limit:g} %",
        )
    return Bound(metric, limit)


# Holds where the user names no budget: agreement where the first output has classes, the error of outputs elsewhere.
DEFAULT_BUDGET = (Bound("agreement", 0.98), Bound("output-error", 0.05), Bound("relc", 0.08))
