"""Intervals: they hold the truth as often as they say, whatever sessions and busy moments do to single times."""

import numpy as np
import pytest

from asapc.timing.blocks import AGAIN
from asapc.timing.ratios import half_width, noise_floor, paired_ratio, unpaired_ratio
from asapc.types.timing import IDENTICAL, Ratio


def simulated(
    draw: np.random.Generator, milliseconds: float, blocks: int, rounds: int, machine: np.ndarray
) -> np.ndarray:
    """Times of a model: sessions are off by 1 %, calls by 5 %, and the machine does to it what it does to others."""
    session = draw.normal(0, 0.01, (blocks, 1))
    return milliseconds * np.exp(session + draw.normal(0, 0.05, (blocks, rounds)) + machine)


def machine(draw: np.random.Generator, blocks: int, rounds: int) -> np.ndarray:
    """A machine of which every tenth round is slow, and every third block half as fast."""
    return 0.7 * (draw.random((blocks, 1)) < 0.3) + draw.exponential(1.0, (blocks, rounds)) * (
        draw.random((blocks, rounds)) < 0.1
    )


@pytest.mark.parametrize("blocks", [5, 8, 20])
def test_paired_intervals_hold_the_true_ratio_on_a_machine_that_changes_its_speed(blocks):
    draw, hits, repetitions = np.random.default_rng(blocks), 0, 100
    for _ in range(repetitions):
        common = machine(draw, blocks, 20)
        one, other = (simulated(draw, ms, blocks, 20, common) for ms in (1.3, 1.0))
        ratio = paired_ratio(one, other)
        hits += ratio.low <= 1.3 <= ratio.high
        assert ratio.low < ratio.value < ratio.high
    assert hits >= 88  # 95 are expected; fewer than 88 come once in 500 times


def test_unpaired_intervals_hold_the_true_ratio():
    draw, hits = np.random.default_rng(0), 0
    for _ in range(100):
        one, other = (simulated(draw, ms, blocks, 20, np.zeros(1)) for ms, blocks in ((1.3, 8), (1.0, 12)))
        ratio = unpaired_ratio(one, other)
        hits += ratio.low <= 1.3 <= ratio.high
    assert hits >= 88


def test_sessions_count_and_not_rounds():
    draw = np.random.default_rng(0)
    few, many = (half_width(paired_ratio(*(simulated(draw, 1.0, 8, n, np.zeros(1)) for _ in "ab"))) for n in (50, 5000))
    assert many > few / 3  # were rounds the sample, it would be a tenth


def test_times_without_noise_have_an_interval_without_width():
    ratio = paired_ratio(np.full((5, 3), 2.0), np.full((5, 3), 1.0))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_noise_floor_is_the_far_end_of_a_files_ratio_to_itself():
    draw = np.random.default_rng(1)
    times = {name: simulated(draw, 1.0, 8, 20, np.zeros(1)) for name in ("a", "a" + AGAIN)}
    pair = paired_ratio(times["a" + AGAIN], times["a"])
    assert noise_floor(times, "a") == max(pair.high, 1 / pair.low) - 1 > 0


@pytest.mark.parametrize(
    ("ratio", "floor", "finding"),
    [
        (Ratio(1.1, 1.05, 1.15), 0.0, "slower"),
        (Ratio(1.1, 1.05, 1.15), 0.06, "not significantly different"),
        (Ratio(0.9, 0.85, 0.95), 0.0, "faster"),
        (Ratio(0.9, 0.85, 0.95), 0.06, "not significantly different"),
        (Ratio(1.0, 0.9, 1.1), 0.0, "not significantly different"),
        (IDENTICAL, 0.0, "identical"),
    ],
)
def test_a_difference_is_one_beyond_interval_and_noise(ratio, floor, finding):
    assert (ratio if ratio.identical else ratio.widened(floor)).finding == finding
