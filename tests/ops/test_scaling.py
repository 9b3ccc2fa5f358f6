import math

import pytest
import torch
from helpers.tolerances import FLOAT32, FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.ops.scaling import (
    MIN_LIVE,
    column_scaling,
    log_row_softmax,
    row_scaling,
    scaled_plan,
    scaling_exponent,
    start,
)

quick = settings(max_examples=40, deadline=None)


@st.composite
def score_matrices(draw, sharpness):
    shape = (2, 3, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return draw(st.sampled_from(sharpness)) * torch.randn(shape, generator=generator, dtype=torch.float64)


scores_within_range = score_matrices([0.0, 1.0, 30.0])


def scaling_kernel(scores, masked=False):
    exponent, shift = scaling_exponent(scores, masked)
    return exponent.exp(), shift


@quick
@given(score_matrices([0.0, 1.0, 30.0, 1e4]))
def test_every_row_and_column_of_the_kernel_holds_a_one_and_nothing_exceeds_it(scores):
    for dtype in (torch.float64, torch.float32):
        kernel, shift = scaling_kernel(scores.to(dtype))
        assert (kernel <= 1).all()
        assert (kernel.amax(dim=-1) == 1).all()
        assert (kernel.amax(dim=-2) == 1).all()
        assert (shift <= 0).all()


@quick
@given(scores_within_range)
def test_kernel_and_shift_are_the_scores_up_to_a_factor_per_column(scores):
    kernel, shift = scaling_kernel(scores)
    per_column = kernel.log() + shift.transpose(-1, -2) - scores
    assert (per_column - per_column[..., :1, :]).abs().max() < FLOAT64 * (1 + scores.abs().max())


@quick
@given(scores_within_range)
def test_a_row_scaling_makes_the_rows_sum_to_one(scores):
    kernel, shift = scaling_kernel(scores)
    v = column_scaling(kernel, shift.exp())
    rows = (row_scaling(kernel, v).transpose(-1, -2) * kernel * v).sum(dim=-1)
    assert difference(rows, torch.ones_like(rows)) < FLOAT64


@quick
@given(scores_within_range)
def test_a_column_scaling_makes_the_columns_equal_in_sum(scores):
    kernel, shift = scaling_kernel(scores)
    u = shift.exp()
    columns = (u.transpose(-1, -2) * kernel * column_scaling(kernel, u)).sum(dim=-2)
    assert difference(columns, columns[..., :1].expand_as(columns)) < FLOAT64


@pytest.mark.parametrize("turned", [False, True])
@quick
@given(scores_within_range)
def test_a_scaled_plan_times_values_is_the_product_of_the_two(turned, scores):
    kernel, shift = scaling_kernel(scores)
    u = shift.exp()
    v = column_scaling(kernel, u)
    plan = u.transpose(-1, -2) * kernel * v
    plan = plan.transpose(-1, -2) if turned else plan
    values = torch.linspace(-1, 2, 4 * plan.shape[-1], dtype=torch.float64).view(-1, 4).expand(2, 3, -1, -1)
    assert difference(scaled_plan(kernel, u, v, None, turned), plan) < FLOAT64
    assert difference(scaled_plan(kernel, u, v, values, turned), plan @ values) < FLOAT64


@quick
@given(score_matrices([1e2, 1e3, 1e4]))
def test_extreme_scores_stay_finite_in_float32(scores):
    kernel, shift = scaling_kernel(scores.float())
    v = column_scaling(kernel, shift.exp())
    for _ in range(20):
        u = row_scaling(kernel, v)
        v = column_scaling(kernel, u)
        assert torch.isfinite(u).all()
        assert torch.isfinite(v).all()
    values = torch.ones(2, 3, scores.shape[-1], 2)
    assert torch.isfinite(scaled_plan(kernel, row_scaling(kernel, v), v, values, turned=False)).all()


@quick
@given(scores_within_range)
def test_where_nothing_is_masked_the_masked_forms_change_nothing(scores):
    for masked, plain in zip(scaling_exponent(scores, masked=True), scaling_exponent(scores), strict=True):
        assert torch.equal(masked, plain)
    assert difference(log_row_softmax(scores, masked=True), scores.log_softmax(dim=-1)) < FLOAT64
    for masked, fused in ((False, True), (False, False), (True, True)):
        assert difference(scaled_plan(*start(scores, masked, fused), None, None, False), scores.softmax(-1)) < FLOAT64


@pytest.mark.parametrize("mask", [-math.inf, -1e9, -1e4, torch.finfo(torch.float32).min])
@quick
@given(scores_within_range, st.data())
def test_masked_rows_and_columns_have_a_kernel_of_zero_and_leave_the_others_as_they_are(mask, scores, data):
    scores = scores.float()
    n, m = scores.shape[-2:]
    rows, columns = data.draw(st.integers(1, n)), data.draw(st.integers(1, m))
    live = scores[..., :rows, :columns]
    masked = torch.full_like(scores, mask)
    masked[..., :rows, :columns] = live
    kernel, shift = scaling_kernel(masked, masked=True)
    assert torch.isfinite(shift).all()
    expected, expected_shift = scaling_kernel(live)
    assert torch.equal(kernel[..., :rows, :columns], expected)
    assert torch.equal(shift[..., :rows], expected_shift)
    assert (kernel[..., rows:, :] == 0).all()
    assert (kernel[..., columns:] == 0).all()
    plan = scaled_plan(*start(masked, masked=True, fused=True), None, None, turned=False)
    assert difference(plan[..., :rows, :columns], live.softmax(dim=-1)) < FLOAT32
    assert (plan[..., rows:, :] == 0).all()
    assert (plan[..., columns:] == 0).all()
    log_plan = log_row_softmax(masked, masked=True)
    assert difference(log_plan[..., :rows, :columns], live.log_softmax(dim=-1)) < FLOAT32
    # What was masked still is, for the step that comes next.
    assert (log_plan[..., rows:, :] < MIN_LIVE).all()
    assert (log_plan[..., columns:] < MIN_LIVE).all()


@pytest.mark.parametrize("least", [1e-10, 1e-20, 1e-27])
def test_gradients_of_small_sums_stay_in_range(least):
    generator = torch.Generator().manual_seed(0)
    kernel = least * torch.rand(1, 1, 6, 5, generator=generator, dtype=torch.float64)
    weights = least * torch.rand(1, 1, 1, 5, generator=generator, dtype=torch.float64)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        operand = kernel.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad((column_scaling(operand, None) * weights.to(dtype)).sum(), operand)
        gradients.append(gradient.double())
    assert difference(gradients[1], gradients[0]) < FLOAT32
    with torch.no_grad():
        assert torch.allclose(column_scaling(kernel, None), 1 / kernel.sum(dim=-2, keepdim=True), rtol=1e-12)
