"""The probe asks a function; here the functions are written by hand."""

import math

import pytest
import torch
from helpers.tolerances import FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.ops.sinkhorn import first_axis, sinkhorn_plan_ref
from asapc.passes.find.probe import NOTHING, NotSinkhorn, double_centre, find_live, find_scale, probe
from asapc.types.site import Loop

quick = settings(max_examples=25, deadline=None)
HEADS = 3
axes = st.sampled_from(["rows", "columns"])
seeds = st.integers(0, 10**6)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ask(respond, scores) -> Loop:
    """What is told of a function, given its answer to some scores and the function itself."""
    plan = respond(scores)
    scale, live = find_scale(scores, plan)
    return probe(scores, plan, scale, live, respond)


def refused(respond, scores) -> NotSinkhorn:
    with pytest.raises(NotSinkhorn) as caught:
        ask(respond, scores)
    assert caught.value.hint
    return caught.value


def divide(plan, half_steps, last, row_mass=1.0, column_mass=1.0, added=0.0):
    axis = first_axis(half_steps, last)
    for _ in range(half_steps):
        if axis == "rows":
            plan, axis = row_mass * plan / (plan.sum(dim=-1, keepdim=True) + added), "columns"
        else:
            plan, axis = column_mass * plan / (plan.sum(dim=-2, keepdim=True) + added), "rows"
    return plan


@quick
@given(seeds, st.integers(3, 7), st.integers(3, 7), st.integers(2, 24), axes)
def test_half_steps_axis_and_scale_are_told(seed, n, m, half_steps, last):
    scale = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    result = ask(lambda s: divide((scale[:, None, None] * s).exp(), half_steps, last), normal(seed, 2, HEADS, n, m))
    assert (result.half_steps, result.last, result.masked) == (half_steps, last, False)
    assert difference(result.scale, scale) < FLOAT64
    mass = result.row_mass if last == "rows" else result.column_mass
    assert difference(mass, torch.ones(1)) < FLOAT64


@quick
@given(seeds, st.integers(2, 12), axes)
def test_what_is_taken_off_rows_or_columns_before_the_loop_does_not_matter(seed, half_steps, last):
    def respond(scores):
        axis = -1 if first_axis(half_steps, last) == "rows" else -2
        return divide((scores - scores.amax(dim=axis, keepdim=True)).exp(), half_steps, last)

    result = ask(respond, normal(seed, 2, HEADS, 6, 6))
    assert (result.half_steps, result.last) == (half_steps, last)


@quick
@given(seeds, st.integers(2, 12), axes, st.booleans())
def test_masses_are_read_off_where_they_are_vectors_and_where_they_are_numbers(seed, half_steps, last, vectors):
    n, m = 5, 7
    rows, columns = (0.5 + normal(seed + i, size).abs() if vectors else torch.rand(1).double() + 0.5
                     for i, size in enumerate((n, m)))  # fmt: skip
    columns = columns * rows.expand(n).sum() / columns.expand(m).sum()
    result = ask(
        lambda s: divide(s.exp(), half_steps, last, rows.unsqueeze(-1), columns), normal(seed + 2, 2, HEADS, n, m)
    )
    assert (result.half_steps, result.last) == (half_steps, last)
    final, mass = (result.row_mass, rows) if last == "rows" else (result.column_mass, columns)
    assert difference(final, mass) < FLOAT64
    # The other's matters up to a factor.
    other, mass = (result.column_mass, columns) if last == "rows" else (result.row_mass, rows)
    assert difference(other / other.sum(), mass / mass.sum()) < FLOAT64


def masked_scores(seed, mask=-math.inf):
    """Scores of two samples with 6 and 4 live keys of 7."""
    scores = normal(seed, 2, HEADS, 5, 7)
    scores[0, ..., 6:] = mask
    scores[1, ..., 4:] = mask
    return scores


@quick
@given(seeds, st.integers(2, 12), axes, st.sampled_from([-math.inf, -1e9]))
def test_a_loop_that_leaves_masked_keys_out_is_told(seed, half_steps, last, mask):
    result = ask(
        lambda s: sinkhorn_plan_ref(s.masked_fill(s < -1e3, -math.inf), half_steps, last), masked_scores(seed, mask)
    )
    assert (result.half_steps, result.last, result.masked) == (half_steps, last, True)
    assert difference(result.scale, torch.ones(HEADS)) < FLOAT64


@pytest.mark.parametrize("whole", [[0], [1], [0, 2], [1, 2]])
def test_samples_that_are_masked_altogether_do_not_count(whole):
    scores = normal(0, 3, HEADS, 5, 7)
    scores[..., 6:] = -math.inf
    scores[whole] = -math.inf
    result = ask(lambda s: sinkhorn_plan_ref(s, 5, "rows").nan_to_num(nan=0.0), scores)
    assert (result.half_steps, result.last, result.masked) == (5, "rows", True)
    assert difference(result.row_mass, torch.ones(1)) < FLOAT64


def test_a_loop_in_scaling_form_that_leaves_its_range_on_sharp_scores_is_told_from_milder_ones():
    def respond(scores):
        kernel = (30 * scores).exp()
        return divide(kernel, 7, "rows").nan_to_num(nan=math.nan)

    result = ask(respond, normal(0, 2, HEADS, 6, 6))
    assert (result.half_steps, result.last) == (7, "rows")


# What is not Sinkhorn scaling, with a word of the reason.


def softmax(scores):
    return scores.softmax(dim=-1)


def dual_softmax(scores):
    return scores.softmax(dim=-1) * scores.softmax(dim=-2)


def sigmoid(scores):
    return divide(scores.sigmoid(), 6, "rows")


def squares(scores):
    return divide(scores.square(), 6, "rows")


def sparse(scores):
    return scores.clamp_min(0)


def outer(scores):
    """A row times a column."""
    return scores.amax(dim=-1, keepdim=True).exp().expand_as(scores)


def identity(scores):
    return scores


def nan(scores):
    return scores * math.nan


def causal(scores):
    return scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf).softmax(dim=-1)


def relaxed(scores):
    f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
    for _ in range(3):
        g = 0.5 * g - 0.5 * torch.logsumexp(scores + f, dim=-2, keepdim=True)
        f = 0.5 * f - 0.5 * torch.logsumexp(scores + g, dim=-1, keepdim=True)
    return torch.exp(scores + f + g)


def rows_then_a_product_of_both(scores):
    plan = divide(scores.exp(), 5, "rows")
    return plan / plan.sum(dim=-2, keepdim=True).sqrt()


def damped_at_the_end(scores):
    plan = divide(scores.exp(), 5, "rows")
    return plan / plan.sum(dim=-2, keepdim=True).pow(0.9)


def other_masses_in_each_head(scores):
    weights = torch.linspace(0.5, 1.5, 6 * HEADS).double().reshape(HEADS, 6, 1)
    return divide(scores.exp(), 6, "rows", row_mass=weights)


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (softmax, "softmax"),
        (dual_softmax, "half-steps"),
        (relaxed, "half-steps"),
        (rows_then_a_product_of_both, "half-steps"),
        (damped_at_the_end, "half-steps"),
        (sigmoid, "multiple of the scores"),
        (squares, "multiple of the scores"),
        (sparse, "is zero"),
        (identity, "negative"),
        (outer, "otherwise does not depend on the scores"),
        (nan, "NaN"),
        (causal, "causal"),
        (other_masses_in_each_head, "half-steps"),
    ],
)
def test_what_is_no_loop_is_refused_with_its_reason(respond, reason):
    error = refused(respond, 2 * normal(0, 2, HEADS, 6, 6))
    assert reason in str(error)
    assert not {"inf", "nan"} & set(str(error).split())
    # Only what is as good as it gets, or no plan at all, leaves nothing to be done.
    assert (error.hint == NOTHING) is (respond in (softmax, identity, outer))


def test_scores_that_tell_nothing_are_refused():
    error = refused(lambda s: divide(s.exp(), 6, "rows"), torch.zeros(2, HEADS, 6, 6, dtype=torch.float64))
    assert "constant" in str(error)
    assert "samples" in error.hint


def test_a_mask_that_comes_in_after_the_scores_is_refused_here():
    live = torch.isfinite(masked_scores(0))
    error = refused(lambda s: sinkhorn_plan_ref(s.masked_fill(~live, -math.inf), 6, "rows"), normal(0, 2, HEADS, 5, 7))
    assert "not masked" in str(error)


def test_another_function_on_the_real_scores_than_on_others_is_refused():
    real = normal(0, 2, HEADS, 6, 6)
    plan = divide(real.exp(), 6, "rows")
    scale, live = find_scale(real, plan)
    with pytest.raises(NotSinkhorn, match="on the real ones"):
        probe(real, plan, scale, live, lambda s: divide(s.exp(), 3, "rows"))


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_double_centring_leaves_nothing_of_row_and_column_terms(seed, rows, columns, more_rows, more_columns):
    n, m = rows + more_rows, columns + more_columns
    plan = torch.zeros(2, HEADS, n, m, dtype=torch.float64)
    plan[..., :rows, :columns] = 1.0
    live = find_live(plan)
    assert live.masked == bool(more_rows or more_columns)
    assert torch.equal(live.cells, plan > 0)
    terms = normal(seed, 2, HEADS, n, 1) + normal(seed + 1, 2, HEADS, 1, m)
    assert double_centre(terms, live).abs().max() < FLOAT64
    matrix = normal(seed + 2, 2, HEADS, n, m)
    centred = double_centre(matrix + terms, live)
    assert (centred - double_centre(matrix, live)).abs().max() < FLOAT64
    assert (centred[~live.cells] == 0).all()


@quick
@given(seeds, st.booleans())
def test_the_scale_is_found_whatever_rows_and_columns_are_multiplied_by(seed, masked):
    scores = masked_scores(seed) if masked else normal(seed, 2, HEADS, 5, 7)
    wanted = torch.tensor([0.1, 2.0, -1.5], dtype=torch.float64)
    if masked:
        wanted = wanted.abs()
    terms = normal(seed + 1, 2, HEADS, 5, 1) + normal(seed + 2, 2, HEADS, 1, 7)
    scale, live = find_scale(scores, (wanted[:, None, None] * scores + terms).exp())
    assert difference(scale, wanted) < FLOAT64
    assert live.masked is masked
