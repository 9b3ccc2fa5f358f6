"""Sliced transport against plans of one-dimensional transport by POT, to which soft sorting tends."""

import numpy as np
import ot
import pytest
import torch
from helpers.tolerances import LP, difference

from asapc.models.sliced import SlicedTransport, random_directions


def expected_plan(q: np.ndarray, k: np.ndarray, directions: np.ndarray, sharpness: float) -> np.ndarray:
    """The mean of the transport plans along each direction (rows of a matrix) of one head, weighted by their costs."""
    n, m = len(q), len(k)
    plans = [ot.emd_1d(q @ direction, k @ direction, ot.unif(n), ot.unif(m)) for direction in directions]
    distances = ((q[:, None] - k) ** 2).sum(axis=-1)
    weights = np.exp(-sharpness * np.array([(plan * distances).sum() for plan in plans]))
    return n * np.average(plans, axis=0, weights=weights)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8), (8, 5)])
@pytest.mark.parametrize("slices", [1, 3, 7])  # of three channels
def test_at_low_temperatures_it_is_the_mean_of_plans_along_the_slices(n: int, m: int, slices: int) -> None:
    q, k = (torch.randn(2, 2, size, 3, dtype=torch.float64) for size in (n, m))
    plan = SlicedTransport(slices, temperature=1e-12, sharpness=0.7).plan(q, k)
    directions = np.concatenate([np.eye(3), np.array(random_directions(3, 4)).T])[:slices]
    for sample in range(2):
        for head in range(2):
            expected = expected_plan(q[sample, head].numpy(), k[sample, head].numpy(), directions, 0.7)
            assert difference(plan[sample, head], torch.from_numpy(expected)) < LP


def test_at_high_temperatures_it_is_the_mean_of_the_values() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 3, dtype=torch.float64)
    output = SlicedTransport(temperature=1e12)(q, k, v)
    torch.testing.assert_close(output, v.mean(dim=-2, keepdim=True).expand_as(output))


def test_directions_are_of_unit_length_and_the_same_in_every_run() -> None:
    directions = np.array(random_directions(4, 9))
    np.testing.assert_allclose(np.linalg.norm(directions, axis=0), 1)
    np.testing.assert_array_equal(directions, random_directions(4, 9))
