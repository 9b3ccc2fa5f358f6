"""Medians of paired ratios, with intervals."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95


def median_ratio(one: Sequence[float], other: Sequence[float], seed: int, resamples: int) -> tuple[float, float, float]:
    """Return the median ratio of times from the same rounds, and the ends of its bootstrapped 95 % interval."""
    interval = bootstrap(
        (one, other),
        lambda a, b, axis: np.median(a / b, axis=axis),
        paired=True,
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(np.median(np.divide(one, other))), float(interval.low), float(interval.high)
