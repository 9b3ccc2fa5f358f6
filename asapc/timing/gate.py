"""Holds the latency of a model to that of another: no alarm from noise, and no pass where noise hides the answer."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import stats

from asapc.timing.blocks import Settled, Times
from asapc.timing.ratios import Values, half_width, noise_floor, paired_ratio, unpaired_ratio
from asapc.types.timing import IDENTICAL, Gate, Outcome, Ratio

HEAD, BASE, REFERENCE = "head", "base", "reference"
SIGNIFICANT = 0.01  # of the rank test
# By how much the machine may be faster or slower, by the reference workload, than it was for the baseline: beyond that
# it is another machine, whatever its name.
MAX_DRIFT = 0.5


def narrow_enough(limit: float, ratio_of: Callable[[Times], Ratio]) -> Settled:
    """Return the rule by which a gate has measured enough: ratio and noise floor are known to half the limit."""

    def settled(times: Times) -> bool:
        return half_width(ratio_of(times)) <= limit / 2 and noise_floor(times, HEAD) <= limit / 2

    return settled


def relative_slowdown(times: Times) -> Ratio:
    """Return the ratio of head to base, which took turns."""
    return paired_ratio(times[HEAD], times[BASE])


def relative_gate(times: Times, batch: int, limit: float) -> Gate:
    """Judge a model beside another that took turns with it.

    Args:
        times: of HEAD, of HEAD opened again and of BASE.
        batch: samples a call.
        limit: the ratio less 1 that is allowed.
    """
    # Which of them took how long in the same round: what else the machine did is in both.
    logs = np.log(times[HEAD] / times[BASE]).ravel()
    p = float(stats.wilcoxon(logs, alternative="greater").pvalue) if np.any(logs) else 1.0
    medians = float(np.median(times[HEAD])), float(np.median(times[BASE]))
    return judge(times, batch, limit, relative_slowdown(times), p, medians)


def scaled(times: Times, name: str) -> Values:
    """Return times in units of the reference workload's in the same round."""
    return times[name] / times[REFERENCE]


def scaled_spread(times: Times) -> Ratio:
    """Return the ratio of a model to the reference workload, of which a baseline has to know how far it varies."""
    return paired_ratio(times[HEAD], times[REFERENCE])


def baseline_slowdown(baseline: Times) -> Callable[[Times], Ratio]:
    """Return what gives the ratio to a baseline, both in units of the reference workload's time."""
    return lambda times: unpaired_ratio(scaled(times, HEAD), scaled(baseline, HEAD))


def baseline_gate(times: Times, baseline: Times, batch: int, limit: float) -> Gate:
    """Judge a model by times that were taken earlier on the same kind of machine.

    Args:
        times: of HEAD, of HEAD opened again and of REFERENCE.
        baseline: of HEAD and REFERENCE then.
        batch: samples a call.
        limit: the ratio less 1 that is allowed.
    """
    now, then = scaled(times, HEAD).ravel(), scaled(baseline, HEAD).ravel()
    p = float(stats.mannwhitneyu(now, then, alternative="greater").pvalue)
    medians = float(np.median(times[HEAD])), float(np.median(baseline[HEAD]))
    drift = unpaired_ratio(times[REFERENCE], baseline[REFERENCE]).value
    verdict = judge(times, batch, limit, baseline_slowdown(baseline)(times), p, medians)
    if max(drift, 1 / drift) - 1 > MAX_DRIFT:
        why = f"the machine takes {drift:.2f} times as long for the same work as it did for the baseline"
        return replace(verdict, outcome="unstable", reason=f"{why}; beside it, {verdict.reason}")
    return verdict


def judge(times: Times, batch: int, limit: float, slowdown: Ratio, p: float, medians: tuple[float, float]) -> Gate:
    """Judge a slowdown: see `Gate` for what makes a regression."""
    floor, blocks = noise_floor(times, HEAD), len(times[HEAD])
    seen = f"{slowdown.value:.3f} times the time ({slowdown.low:.3f} to {slowdown.high:.3f})"
    clear = slowdown.low > 1 + floor and p < SIGNIFICANT
    too_slow = slowdown.value > 1 + limit
    outcome: Outcome = "passed"
    if too_slow and clear:
        outcome, reason = "regression", f"it takes {seen}, more than the {1 + limit:.2f} that is allowed"
    elif too_slow or (half_width(slowdown) > limit and slowdown.high > 1 + limit):
        outcome, reason = "unstable", f"it took {seen}, while two openings of one file differ by up to {floor:.1%}"
    else:
        reason = f"it takes {seen}, within the {1 + limit:.2f} that is allowed"
    return Gate(batch, outcome, reason, slowdown, floor, p, limit, medians, blocks)


def identical_gate(batch: int, limit: float) -> Gate:
    """Return the gate of a graph held to itself, of which nothing was timed."""
    return Gate(batch, "identical", "both are the same graph", IDENTICAL, 0.0, None, limit, None, 0)
