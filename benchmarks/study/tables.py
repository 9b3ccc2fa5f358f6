"""Tables of the study's page, and how their cells say means and spreads."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table whose first column is text and whose others are numbers."""
    yield "| " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    for cells in lines:
        yield "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean with the standard deviation over seeds, both in significant digits; empty without values."""
    if not values:
        return ""
    mean = f"{fmean(values):.{digits}g}"
    return f"{mean} ± {stdev(values):.1g}" if len(values) > 1 else mean


def percent(values: Sequence[float]) -> str:
    """Return the mean of shares in per cent with the standard deviation over seeds; empty without values."""
    if not values:
        return ""
    mean = f"{100 * fmean(values):.1f}"
    return f"{mean} ± {100 * stdev(values):.1f}" if len(values) > 1 else mean
