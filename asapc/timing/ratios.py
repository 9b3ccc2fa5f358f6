"""Ratios of raw times, with intervals: blocks are the sample, since sessions differ more than rounds do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from asapc.timing.blocks import AGAIN, Times
from asapc.types.timing import Ratio

Values = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
TRIM = 0.2  # of the blocks, at either end: what a busy moment did to one does not count


def paired_ratio(one: Values, other: Values, seed: int = 0) -> Ratio:
    """Return how many times as long one model takes as another, from times of the same rounds.

    A block's value is the median of its rounds' log ratios; the ratio is that of the blocks' trimmed mean, its interval
    their bootstrap, widened for few blocks: Hesterberg's expanded percentiles (What Teachers Should Know about the
    Bootstrap, 2015, section 5.3), by which they cover as often as Student's t does.

    Args:
        one: (blocks, rounds) milliseconds of the one, of two blocks at least.
        other: of the other, from the same rounds.
        seed: of the bootstrap.
    """
    blocks = np.median(np.log(one / other), axis=1)
    return interval([blocks], center, len(blocks), seed)


def unpaired_ratio(one: Values, other: Values, seed: int = 0) -> Ratio:
    """Do as `paired_ratio`, for times that were taken apart: both are (blocks, rounds), of which numbers may differ."""
    blocks = [np.median(np.log(times), axis=1) for times in (one, other)]
    return interval(blocks, difference, min(map(len, blocks)), seed)


def interval(values: list[Values], statistic: Callable[..., Any], blocks: int, seed: int) -> Ratio:
    """Bootstrap a statistic of log ratios, and return it as a ratio."""
    wide = np.sqrt(blocks / (blocks - 1)) * stats.t.ppf((1 + LEVEL) / 2, blocks - 1)
    result = stats.bootstrap(
        values,
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        confidence_level=1 - 2 * stats.norm.sf(wide),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    value, low, high = (float(np.exp(bound)) for bound in (statistic(*values), result.low, result.high))
    return Ratio(value, low, high)


center = partial(stats.trim_mean, proportiontocut=TRIM, axis=-1)


def difference(one: Values, other: Values, axis: int = -1) -> Any:
    """Return the difference of two trimmed means."""
    return center(one) - center(other)


def noise_floor(times: Times, name: str) -> float:
    """Return how far from 1 a ratio of one file to itself may be here: the far end of its interval, less 1."""
    ratio = paired_ratio(times[name + AGAIN], times[name])
    return max(ratio.high, 1 / ratio.low) - 1


def half_width(ratio: Ratio) -> float:
    """Return half the width of an interval, relative."""
    return (ratio.high - ratio.low) / (2 * ratio.value)
