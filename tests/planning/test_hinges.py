"""Where hinges go: equal shares of the points, counted from their mean."""

import pytest
import torch
from helpers.fitted import DIM, HEADS, site
from helpers.points import activations, correlated_points, normal

from asapc.planning.bases import balanced_bases
from asapc.planning.hinges import BINS, MAX_DEVIATIONS, count_places, quantiles
from asapc.types.choices import SIDES


def test_knots_part_the_points_in_equal_shares():
    points = normal(0, 1, 1, 20_000, 1)
    points = (points - points.mean()) / points.std(correction=0)
    bins = ((points.flatten() / MAX_DEVIATIONS + 1) * BINS / 2).long().clamp(0, BINS - 1)
    counts = torch.bincount(bins, minlength=BINS).double().view(1, 1, -1)
    actual = quantiles(counts, 8)
    expected = torch.quantile(points.flatten(), torch.arange(1, 8, dtype=torch.float64) / 8)
    assert actual.shape == (1, 1, 7)
    assert (actual.flatten() - expected).abs().max() < 2 * MAX_DEVIATIONS / BINS


@pytest.mark.parametrize("side", SIDES)
def test_places_are_counted_from_the_mean_of_the_points_wherever_the_origin_is(side):
    queries, keys = correlated_points(0), correlated_points(10)
    bases = balanced_bases([site()], iter([activations(queries, keys)]))
    moved = {"queries": queries, "keys": keys}
    moved[side] = moved[side] + 100 * normal(20, 1, HEADS, 1, DIM)
    here = count_places([site()], bases, iter([activations(queries, keys)]))["attention", side]
    there = count_places([site()], bases, iter([activations(**moved)]))["attention", side]
    assert torch.equal(there, here)
