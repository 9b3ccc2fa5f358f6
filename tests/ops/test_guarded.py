"""Sinkhorn loops with a constant in their divisors: the scaling form against its reference, and against plain loops."""

import pytest
import torch
from helpers.tolerances import FLOAT32, FLOAT64, difference

from asapc.ops.guarded import GuardedSinkhorn, guarded_plan_ref
from asapc.ops.sinkhorn import sinkhorn_plan_ref
from asapc.ops.small import SmallSinkhorn
from asapc.passes.find.guards import readings
from asapc.types.site import Floor, Guard

SCORES = 3 * torch.randn(2, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VALUES = torch.randn(2, 2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


FLOORS = {
    "added": [Floor(1e-3, False)],
    "clamped": [Floor(1e-3, True)],
    "two, added": [Floor(1e-3, False), Floor(1e-1, False)],
    "two, one of them clamped": [Floor(1e-2, True), Floor(1e-3, False)],
}


@pytest.mark.parametrize("floors", FLOORS.values(), ids=FLOORS)
@pytest.mark.parametrize("last", ["rows", "columns"])
@pytest.mark.parametrize("half_steps", [2, 3, 6, 7])
def test_the_scaling_form_equals_its_reference_for_every_guard(half_steps, last, floors):
    for guard in readings(floors):
        expected = guarded_plan_ref(SCORES, half_steps, last, guard)
        operator = GuardedSinkhorn(half_steps, last, guard)
        assert difference(operator(SCORES), expected) < FLOAT64, guard
        assert difference(operator(SCORES, values=VALUES), expected @ VALUES) < FLOAT64, guard
        for lowering in ("materialised", "interleaved"):
            small = SmallSinkhorn(half_steps, last, (5, 7), guard, lowering=lowering)
            assert difference(small(SCORES), expected) < FLOAT64, (guard, lowering)
            assert difference(small(SCORES, values=VALUES), expected @ VALUES) < FLOAT64, (guard, lowering)
            if guard.kernel == "plain":
                assert difference(small.from_kernel(SCORES.exp()), expected) < FLOAT64, (guard, lowering)
        logarithm = GuardedSinkhorn(half_steps, last, guard, logarithm=True)(SCORES)
        assert difference(logarithm.exp(), expected) < FLOAT64, guard


def test_masses_of_ones_own_are_those_of_the_last_axis():
    mass = torch.rand(5, dtype=torch.float64) + 0.5
    guard = Guard(None, Floor(1e-3, False), "plan", "plain", "balanced", "same")
    plan = guarded_plan_ref(SCORES, 6, "rows", guard, row_mass=mass)
    assert difference(plan.sum(dim=-1), mass.expand(2, 2, 5)) < FLOAT64
    assert difference(GuardedSinkhorn(6, "rows", guard, row_mass=mass)(SCORES), plan) < FLOAT64


@pytest.mark.parametrize("half_steps", [2, 5])
def test_a_constant_that_does_not_act_leaves_the_plain_loop(half_steps):
    expected = sinkhorn_plan_ref(SCORES, half_steps, "rows", column_mass=torch.ones(1, dtype=torch.float64))
    for guard in readings([Floor(1e-300, True)]):
        assert difference(guarded_plan_ref(SCORES, half_steps, "rows", guard), expected) < FLOAT64, guard


@pytest.mark.parametrize("clamped", [False, True], ids=["added", "clamped"])
def test_vectors_of_any_size_that_products_with_values_can_take_are_those_of_the_loop(clamped):
    """Sums of 1e-10 are divided by constants as small: vectors have to reach 1e10, far from the largest float32."""
    scores = SCORES.float() - 25.0
    for guard in readings([Floor(1e-12, clamped)]):
        expected = guarded_plan_ref(scores, 7, "rows", guard)
        plan = GuardedSinkhorn(7, "rows", guard)(scores)
        assert difference(plan.double(), expected) < FLOAT32, guard


def test_columns_that_are_zero_in_float32_stay_zero():
    scores = SCORES.float().clone()
    scores[..., 2] = -200.0  # exp gives 0
    floor = Floor(1e-6, False)
    operator = GuardedSinkhorn(40, "rows", Guard(floor, floor, "plan", "plain", "one", "same"))
    plan, result = operator(scores), operator(scores, values=100 * VALUES.float())
    assert (plan[..., 2] == 0).all()
    assert difference(result, plan @ (100 * VALUES.float())) < FLOAT32
