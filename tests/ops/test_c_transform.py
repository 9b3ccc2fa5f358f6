import math

import pytest
import torch
from helpers.tolerances import FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.ops.c_transform import closure, column_step, plan, row_step
from asapc.ops.sinkhorn import sinkhorn_duals

quick = settings(max_examples=30, deadline=None)


@st.composite
def problems(draw):
    """Scores (2, 3, N, M) and duals f (2, 3, N), g (2, 3, M)."""
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sharpness = draw(st.sampled_from([0.0, 1.0, 5.0, 50.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)

    return sharpness * normal(n, m), normal(n), normal(m)


@quick
@given(problems())
def test_after_a_row_step_every_row_sums_to_one(problem):
    scores, _, g = problem
    rows = plan(scores, row_step(scores, g), g).sum(dim=-1)
    assert difference(rows, torch.ones_like(rows)) < FLOAT64


@quick
@given(problems())
def test_after_a_column_step_every_column_sums_to_queries_over_keys(problem):
    scores, f, _ = problem
    columns = plan(scores, f, column_step(scores, f)).sum(dim=-2)
    n, m = scores.shape[-2:]
    assert difference(columns, torch.full_like(columns, n / m)) < FLOAT64


@quick
@given(problems(), st.randoms(use_true_random=False))
def test_permuted_queries_permute_f_and_leave_g(problem, random):
    scores, f, _ = problem
    order = random.sample(range(f.shape[-1]), f.shape[-1])
    f_closed, g_closed = closure(scores, f)
    f_permuted, g_permuted = closure(scores[..., order, :], f[..., order])
    assert difference(f_permuted, f_closed[..., order]) < FLOAT64
    assert difference(g_permuted, g_closed) < FLOAT64


@quick
@given(problems(), st.randoms(use_true_random=False))
def test_permuted_keys_permute_g_and_leave_f(problem, random):
    scores, f, g = problem
    order = random.sample(range(g.shape[-1]), g.shape[-1])
    f_closed, g_closed = closure(scores, f)
    f_permuted, g_permuted = closure(scores[..., order], f)
    assert difference(f_permuted, f_closed) < FLOAT64
    assert difference(g_permuted, g_closed[..., order]) < FLOAT64


@quick
@given(problems(), st.floats(-100, 100))
def test_a_constant_in_f_changes_the_closure_by_that_constant_alone(problem, constant):
    scores, f, _ = problem
    f_closed, g_closed = closure(scores, f)
    f_shifted, g_shifted = closure(scores, f + constant)
    assert difference(f_shifted, f_closed + constant) < FLOAT64
    assert difference(g_shifted, g_closed - constant) < FLOAT64


@quick
@given(problems())
def test_the_closed_plan_does_not_see_column_constants_in_the_scores(problem):
    scores, f, g = problem
    actual = plan(scores + g.unsqueeze(-2), *closure(scores + g.unsqueeze(-2), f))
    assert difference(actual, plan(scores, *closure(scores, f))) < FLOAT64


@quick
@given(problems())
def test_a_row_constant_in_the_scores_is_a_dual(problem):
    scores, f, _ = problem
    actual = plan(scores + f.unsqueeze(-1), *closure(scores + f.unsqueeze(-1), torch.zeros_like(f)))
    assert difference(actual, plan(scores, *closure(scores, f))) < FLOAT64


@pytest.mark.parametrize("half_steps", range(3, 13))
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (4, 9), (9, 4)])
def test_closing_the_dual_of_half_step_t_minus_2_is_the_teacher_of_t_half_steps(half_steps, queries, keys):
    scores = 5 * torch.randn(2, 3, queries, keys, dtype=torch.float64)
    source, _ = sinkhorn_duals(scores, half_steps - 2)
    f, g = sinkhorn_duals(scores, half_steps)
    f_closed, g_closed = closure(scores, source)
    # The same operations in the same order: equal to the last bit.
    assert torch.equal(f_closed, f)
    assert torch.equal(g_closed, g)


@quick
@given(problems())
def test_extreme_scores_stay_finite_in_float32(problem):
    scores, f, _ = (t.float() for t in problem)
    scores = 1e4 * scores / scores.abs().amax().clamp_min(1)
    for dual in closure(scores, 1e4 * f):
        assert torch.isfinite(dual).all()


@quick
@given(problems(), st.booleans(), st.integers(0, 10**6))
def test_steps_scale_to_the_masses_that_they_are_given(problem, one, seed):
    scores, f, g = problem
    n, m = scores.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (0.1 + torch.rand(1 if one else size, generator=generator, dtype=torch.float64) for size in (n, m))
    row_sums = plan(scores, row_step(scores, g, rows), g).sum(dim=-1)
    column_sums = plan(scores, f, column_step(scores, f, columns)).sum(dim=-2)
    assert difference(row_sums, rows.expand_as(row_sums)) < FLOAT64
    assert difference(column_sums, columns.expand_as(column_sums)) < FLOAT64


@quick
@given(problems(), st.data())
def test_masked_rows_and_columns_have_dual_zero_and_take_no_part(problem, data):
    scores, f, g = problem
    n, m = scores.shape[-2:]
    rows, columns = data.draw(st.integers(1, n)), data.draw(st.integers(1, m))
    masked = torch.full_like(scores, -math.inf)
    masked[..., :rows, :columns] = scores[..., :rows, :columns]
    live = masked[..., :rows, :columns]
    actual = row_step(masked, g)
    assert difference(actual[..., :rows], row_step(live, g[..., :columns])) < FLOAT64
    assert (actual[..., rows:] == 0).all()
    mass = torch.full((1,), n / m, dtype=torch.float64)
    actual = column_step(masked, f)
    assert difference(actual[..., :columns], column_step(live, f[..., :rows], mass)) < FLOAT64
    assert (actual[..., columns:] == 0).all()
