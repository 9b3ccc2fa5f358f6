"""Tables of the study's page, and how their cells say means and spreads."""

from collections.abc import Iterable, Iterator, Sequence
from math import floor, log10
from statistics import fmean, stdev

SMALL = -4  # the order of magnitude below which numbers are written with exponents


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table whose first column is text and whose others are numbers."""
    yield "| " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    for cells in lines:
        yield "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    """Return the mean, in three significant digits, with the standard deviation over seeds; empty without values."""
    if not values:
        return ""
    mean = fmean(values)
    size = floor(log10(abs(mean))) if mean else 0
    return plus_minus(values, f".{max(0, 2 - size)}f" if size >= SMALL else ".1e")


def percent(values: Sequence[float]) -> str:
    """Return the mean of shares in per cent with the standard deviation over seeds; empty without values."""
    return plus_minus([100 * value for value in values], ".1f")


def plus_minus(values: Sequence[float], style: str) -> str:
    """Return the mean and the standard deviation, where there are values for them."""
    numbers = [of(values) for of, least in ((fmean, 1), (stdev, 2)) if len(values) >= least]
    return " ± ".join(f"{number:{style}}" for number in numbers)


def half_width(value: float, low: float, high: float) -> float:
    """Return how far an interval reaches to either side, as a share of its value."""
    return (high - low) / (2 * value)
