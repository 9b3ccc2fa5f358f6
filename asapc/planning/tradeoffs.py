"""The front of the whole model: what every budget would cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil, floor, log10

from asapc.config import CompileConfig
from asapc.fidelity.budget import reached
from asapc.planning.check import Check
from asapc.planning.choose import decide, rows_of
from asapc.types.choices import Selection, Tradeoff

# Errors of outputs below this may as well come from another order of sums, in another runtime.
ROUNDING = 1e-5
Reached = Mapping[str, float | None]


def find_tradeoffs(check: Check, config: CompileConfig, advance: Callable[[str], None]) -> list[Tradeoff]:
    """List what selections cost and keep: the model's front, and what the options ask for, cheapest first.

    Args:
        check: the model and its alternatives.
        config: the budget decides which row is the chosen one.
        advance: called with a line about the progress.
    """
    chosen = decide(check, config, advance)
    selections = {check.name(selection): selection for selection in (*rows_of(check, config), chosen)}
    ordered = sorted(selections.values(), key=lambda selection: selection.cost)
    rows: list[Tradeoff] = []
    for number, selection in enumerate(ordered, 1):
        advance(f"checking the whole model, row {number} of {len(ordered)}")
        is_chosen = check.name(selection) == check.name(chosen)
        rows.append(Tradeoff(selection, selection.cost, reached(check(selection, of_sites=False)), None, is_chosen))
    terms = [term_of(row.reached, [other.reached for other in rows[:number]]) for number, row in enumerate(rows)]
    return [
        replace(row, term=term) if term and gives(check, config, term, row.selection) else row
        for row, term in zip(rows, terms, strict=True)
    ]


def gives(check: Check, config: CompileConfig, term: str, selection: Selection) -> bool:
    """Return whether a budget of one term leads to a selection."""
    return check.name(decide(check, replace(config, fidelity=(term,)))) == check.name(selection)


def term_of(row: Reached, cheaper: Sequence[Reached]) -> str | None:
    """Return a term of a budget that a row keeps and cheaper ones do not, rounded to what can be read."""
    agreement, error = row["agreement"], row["output-error"]
    if agreement is not None:
        agreement = floor(1e4 * agreement) / 1e4
        if all((other["agreement"] or 0.0) < agreement for other in cheaper):
            return f"agreement>={agreement:g}"
    if error is not None and 0 < error < 1:
        digit = 10.0 ** (floor(log10(error)) - 1)  # the second
        error = max(ceil(error / digit) * digit, ROUNDING)
        if all((other["output-error"] or 0.0) > error for other in cheaper):
            return f"output-error<={error:.2g}"
    return None
