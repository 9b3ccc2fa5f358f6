"""Exact scaling of small matrices, packed; with a guard `test_guarded.py` has it."""

import pytest
import torch
from helpers.tolerances import FLOAT64, difference

from asapc.ops.sinkhorn import sinkhorn_plan_ref
from asapc.ops.small import SmallSinkhorn

SCORES = 3 * torch.randn(3, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LOWERINGS = ["materialised", "interleaved"]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("last", ["rows", "columns"])
@pytest.mark.parametrize("half_steps", [2, 7, 40])
def test_small_matrices_are_scaled_as_large_ones(half_steps, last, lowering):
    values = torch.randn(3, 5, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = sinkhorn_plan_ref(SCORES, half_steps, last)
    operator = SmallSinkhorn(half_steps, last, (4, 6), lowering=lowering)
    assert difference(operator(SCORES), expected) < FLOAT64
    assert difference(operator(SCORES, values=values), expected @ values) < FLOAT64
    assert difference(operator(100 * SCORES.float()).double(), sinkhorn_plan_ref(100 * SCORES, half_steps, last)) < 1e-3


@pytest.mark.parametrize("half_steps", [2, 5])
def test_masses_are_kept(half_steps):
    rows, columns = torch.rand(4, dtype=torch.float64) + 0.5, torch.rand(6, dtype=torch.float64) + 0.5
    for last in ("rows", "columns"):
        expected = sinkhorn_plan_ref(SCORES, half_steps, last, rows, columns)
        operator = SmallSinkhorn(half_steps, last, (4, 6), None, rows, columns)
        assert difference(operator(SCORES), expected) < FLOAT64
        expected = sinkhorn_plan_ref(SCORES, half_steps, last, rows, columns[:1])
        interleaved = SmallSinkhorn(half_steps, last, (4, 6), None, rows, columns[:1], "interleaved")
        assert difference(interleaved(SCORES), expected) < FLOAT64
