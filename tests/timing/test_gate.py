"""The gate on simulated raw times: no alarm where nothing changed, one where something did, and neither in the dark."""

import numpy as np
import pytest

from asapc.timing.blocks import AGAIN
from asapc.timing.gate import (
    BASE,
    HEAD,
    REFERENCE,
    baseline_gate,
    baseline_slowdown,
    identical_gate,
    narrow_enough,
    relative_gate,
    relative_slowdown,
)

LIMIT = 0.03


def times(seed: int, slowdown: float, session: float, blocks: int = 16, speed: float = 1.0) -> dict[str, np.ndarray]:
    """Raw times of all that gates look at: sessions off by `session`, calls by 3 %, some rounds far slower for all."""
    draw = np.random.default_rng(seed)
    busy = draw.exponential(1.0, (blocks, 20)) * (draw.random((blocks, 20)) < 0.1)
    milliseconds = {HEAD: 2.0 * slowdown, HEAD + AGAIN: 2.0 * slowdown, BASE: 2.0, REFERENCE: 2.2}
    return {
        name: ms * speed * np.exp(draw.normal(0, session, (blocks, 1)) + draw.normal(0, 0.03, (blocks, 20)) + busy)
        for name, ms in milliseconds.items()
    }


def outcomes(slowdown: float, session: float = 0.01, relative: bool = True) -> list[str]:
    if relative:
        return [relative_gate(times(seed, slowdown, session), 1, LIMIT).outcome for seed in range(40)]
    return [
        baseline_gate(times(seed, slowdown, session), times(1000 + seed, 1.0, session), 1, LIMIT).outcome
        for seed in range(40)
    ]


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "baseline"])
def test_nothing_changed_is_no_alarm_and_ten_per_cent_are_one(relative):
    assert outcomes(1.0, relative=relative).count("passed") >= 39
    assert outcomes(1.1, relative=relative).count("regression") >= 39
    assert outcomes(0.8, relative=relative).count("passed") == 40


def test_five_per_cent_are_mostly_caught_and_one_per_cent_never():
    assert outcomes(1.05).count("regression") >= 36
    assert "regression" not in outcomes(1.01)


def test_a_difference_that_is_no_larger_than_that_of_two_openings_is_no_alarm():
    noisy = outcomes(1.0, session=0.2)
    assert "regression" not in noisy
    assert noisy.count("unstable") >= 30


def test_a_machine_that_slows_down_as_a_whole_does_not_alarm_and_one_that_slows_much_does_not_pass():
    baseline = times(1, 1.0, 0.005)
    assert baseline_gate(times(2, 1.0, 0.005, speed=1.05), baseline, 1, LIMIT).outcome == "passed"
    for speed in (0.6, 1.6):
        gate = baseline_gate(times(2, 1.0, 0.005, speed=speed), baseline, 1, LIMIT)
        assert gate.outcome == "unstable"
        assert "times as long for the same work" in gate.reason


def test_enough_is_measured_when_the_intervals_are_narrow_wherever_they_lie():
    baseline = times(9, 1.0, 0.005)
    for ratio in (relative_slowdown, baseline_slowdown(baseline)):
        settled = narrow_enough(LIMIT, ratio)
        assert all(settled(times(3, slowdown, 0.002)) for slowdown in (0.5, 1.0, 1.04, 2.0))
        assert not any(settled(times(3, slowdown, 0.2, blocks=5)) for slowdown in (0.5, 1.0, 1.04, 2.0))


def test_times_that_are_all_the_same_pass():
    same = {name: np.ones((5, 4)) for name in (HEAD, HEAD + AGAIN, BASE)}
    assert relative_gate(same, 1, LIMIT).outcome == "passed"


def test_a_graph_is_not_timed_beside_itself():
    gate = identical_gate(8, LIMIT)
    assert (gate.outcome, gate.milliseconds, gate.slowdown.finding) == ("identical", None, "identical")
