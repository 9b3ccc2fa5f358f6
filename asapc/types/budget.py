"""The fidelity budget: its metrics and terms, and how to read one."""

import re
from typing import NamedTuple

from asapc.errors import OptionError

METRICS = {
    "agreement": ">=",
    "metric-drop": "<=",
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
        """Whether a value keeps this term; NaN never does."""
        return value >= self.limit if METRICS[self.metric] == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.metric}{METRICS[self.metric]}{self.limit:g}"


def parse_bound(text: str) -> Bound:
    """Read one term of a fidelity budget, e.g. "agreement>=0.99".

    Raises:
        OptionError: not of that form, an unknown metric, or the comparison points the wrong way.
    """
    match = re.fullmatch(r"\s*([a-z-]+)\s*(>=|<=)\s*([0-9.eE+-]+)\s*", text)
    terms = ", ".join(f"{name}{op}VALUE" for name, op in METRICS.items())
    # Bash turns an unquoted agreement>=0.99 into "agreement", and its output into a file named "=0.99".
    hint = f"use one of {terms}, in quotes since shells redirect at > and <: --fidelity 'agreement>=0.99'"
    if match is None or METRICS.get(match[1]) != match[2]:
        raise OptionError(f"cannot read the fidelity budget {text!r}", hint)
    try:
        return Bound(match[1], float(match[3]))
    except ValueError:
        raise OptionError(f"{match[3]!r} in the fidelity budget {text!r} is not a number", hint) from None


# Holds where the user names no budget, as far as it can be judged.
DEFAULT_BUDGET = (Bound("agreement", 0.98), Bound("relc", 0.08))
