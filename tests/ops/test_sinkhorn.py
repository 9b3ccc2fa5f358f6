import math
from itertools import islice, product

import pytest
import torch
import torch.nn.functional as F
from helpers.masses import masses_of
from helpers.tolerances import FLOAT32, FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.ops.c_transform import column_step, plan, row_step
from asapc.ops.scaling import MAX_SPREAD
from asapc.ops.sinkhorn import (
    Sinkhorn,
    first_axis,
    kernel_spread,
    scaled_closures,
    scaled_duals,
    sinkhorn_duals,
    sinkhorn_iterates,
    sinkhorn_plan_ref,
)

quick = settings(max_examples=40, deadline=None)
sizes = st.integers(1, 9)
seeds = st.integers(0, 10**6)
axes = st.sampled_from(["rows", "columns"])


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divided(scores, half_steps, last):
    """The definition, without logarithms or duals: divide by row sums and by column sums in turn."""
    n, m = scores.shape[-2:]
    result = scores.exp()
    axis = last if half_steps % 2 else {"rows": "columns", "columns": "rows"}[last]
    for _ in range(half_steps):
        if axis == "rows":
            result, axis = result / result.sum(dim=-1, keepdim=True), "columns"
        else:
            result, axis = result / result.sum(dim=-2, keepdim=True) * n / m, "rows"
    return result


def loop(scores, half_steps, last="rows"):
    return plan(scores, *sinkhorn_duals(scores, half_steps, last))


@quick
@given(seeds, sizes, sizes, st.integers(1, 41), axes)
def test_the_reference_divides_by_row_sums_and_column_sums_in_turn(seed, n, m, half_steps, last):
    scores = 3 * normal(seed, 2, 3, n, m)
    expected = divided(scores, half_steps, last)
    assert difference(sinkhorn_plan_ref(scores, half_steps, last), expected) < FLOAT64


@quick
@given(seeds, sizes, sizes, st.integers(1, 9), axes)
def test_the_axis_of_the_last_half_step_has_its_marginals(seed, n, m, half_steps, last):
    actual = loop(5 * normal(seed, 2, 3, n, m), half_steps, last)
    sums, expected = (actual.sum(dim=-1), 1.0) if last == "rows" else (actual.sum(dim=-2), n / m)
    assert difference(sums, torch.full_like(sums, expected)) < FLOAT64


@quick
@given(seeds, sizes, sizes, st.integers(1, 41), axes, st.sampled_from([1.0, 10.0, 100.0, 1000.0]), st.booleans())
def test_duals_from_one_kernel_are_those_of_the_loop(seed, n, m, half_steps, last, scale, masked):
    """Where scores spread too far for that, or are masked, too."""
    scores = scale * normal(seed, 2, 3, n, m)
    if masked:
        scores[0, :, :, m // 2 :] = -torch.inf
    masses = masses_of(scores, seed)
    one, other = (f(scores, half_steps, last, **masses) for f in (scaled_duals, sinkhorn_duals))
    for actual, expected in zip(one, other, strict=True):
        assert actual.shape == expected.shape
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-9, equal_nan=True)


def test_iterates_alternate_from_the_axis_they_are_given():
    scores = normal(0, 2, 3, 4, 5)
    assert [axis for axis, _, _ in islice(sinkhorn_iterates(scores, "rows"), 3)] == ["rows", "columns", "rows"]
    assert [axis for axis, _, _ in islice(sinkhorn_iterates(scores, "columns"), 2)] == ["columns", "rows"]


@quick
@given(seeds, sizes, sizes, st.integers(1, 9))
def test_a_loop_that_starts_on_one_axis_does_not_see_constants_along_it(seed, n, m, half_steps):
    scores = normal(seed, 2, 3, n, m)
    even = 2 * half_steps
    row_constants, column_constants = 3 * normal(seed + 1, 2, 3, n, 1), 3 * normal(seed + 2, 2, 3, 1, m)
    # An even number of half-steps that ends on columns starts on rows, and the other way round.
    assert difference(loop(scores + row_constants, even, "columns"), loop(scores, even, "columns")) < FLOAT64
    assert difference(loop(scores + column_constants, even, "rows"), loop(scores, even, "rows")) < FLOAT64


@quick
@given(seeds, sizes, sizes)
def test_a_converged_plan_has_both_marginals_and_sees_no_row_or_column_constants(seed, n, m):
    scores = normal(seed, 2, 3, n, m)
    converged = loop(scores, 600)
    assert difference(converged.sum(dim=-2), torch.full((2, 3, m), n / m, dtype=torch.float64)) < FLOAT64
    shifted = scores + 2 * normal(seed + 1, 2, 3, n, 1) + 2 * normal(seed + 2, 2, 3, 1, m)
    assert difference(loop(shifted, 600), converged) < FLOAT64


@quick
@given(seeds, sizes, sizes, st.integers(1, 41), axes, st.sampled_from([0.1, 1.0, 8.0, 30.0]))
def test_the_scaling_form_equals_the_reference_in_float64(seed, n, m, half_steps, last, sharpness):
    assert scaling_form_error(torch.float64, seed, n, m, half_steps, last, sharpness) < FLOAT64


@settings(max_examples=150, deadline=None)
@given(seeds, sizes, sizes, st.integers(1, 41), axes, st.sampled_from([0.1, 1.0, 8.0]))
def test_the_scaling_form_equals_the_reference_in_float32(seed, n, m, half_steps, last, sharpness):
    assert scaling_form_error(torch.float32, seed, n, m, half_steps, last, sharpness) < FLOAT32


def scaling_form_error(dtype, seed, n, m, half_steps, last, sharpness):
    # Heads differ, so that one taken for another shows.
    heads = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)[:, None, None]
    scores, values = (sharpness * heads * normal(seed, 2, 3, n, m)).to(dtype), normal(seed + 1, 2, 3, m, 4).to(dtype)
    expected = sinkhorn_plan_ref(scores, half_steps, last)
    errors = []
    for wide in {kernel_spread(scores) > MAX_SPREAD, True}:
        operator = Sinkhorn(half_steps, last, wide=wide)
        plan, output = operator(scores), operator(scores, values=values)
        assert plan.dtype == output.dtype == dtype
        errors += [difference(plan, expected), difference(output, expected @ values.double())]
    return max(errors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@pytest.mark.parametrize(("half_steps", "last"), [(201, "rows"), (400, "columns"), (1000, "rows")])
def test_a_wide_kernel_stays_in_range_over_hundreds_of_half_steps(half_steps, last, dtype, tolerance):
    points = [100 * normal(0, 2, 3, 12, 4), normal(1, 2, 3, 9, 4)]
    scores = (points[0] @ points[1].transpose(-1, -2) / 2).to(dtype)
    values = normal(2, 2, 3, 9, 4).to(dtype)
    expected = sinkhorn_plan_ref(scores, half_steps, last)
    operator = Sinkhorn(half_steps, last, wide=True)
    assert difference(operator(scores), expected) < tolerance
    assert difference(operator(scores, values=values), expected @ values.double()) < tolerance
    logarithm = Sinkhorn(half_steps, last, wide=True, logarithm=True)(scores)
    assert difference(logarithm.exp(), expected) < 10 * tolerance
    marked = torch.nn.functional.pad(scores, (0, 2, 0, 3), value=-1e4)
    plan = Sinkhorn(half_steps, last, masked=True, wide=True)(marked)
    assert (plan[..., 9:] == 0).all()
    assert (plan[..., 12:, :] == 0).all()
    # Columns are scaled to the number of rows over that of columns, masked ones included.
    masses = {"column_mass": torch.tensor([15 / 11], dtype=torch.float64)}
    assert difference(plan[..., :12, :9], sinkhorn_plan_ref(scores, half_steps, last, **masses)) < tolerance


def test_what_is_wholly_masked_has_no_part_in_the_spread_of_a_kernel():
    scores = normal(0, 2, 1, 5, 5)
    spread = kernel_spread(scores[:1])
    masked = torch.nn.functional.pad(scores, (0, 2, 0, 3), value=-torch.inf)  # in both axes
    masked[1] = -torch.inf
    assert kernel_spread(masked) == pytest.approx(spread)
    assert kernel_spread(masked[1:]) == 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_one_half_step_on_rows_is_softmax_attention(dtype, tolerance):
    queries, keys, values = (normal(i, 2, 3, n, 8).to(dtype) for i, n in enumerate([5, 7, 7]))
    actual = Sinkhorn(1)(0.7 * queries @ keys.transpose(-1, -2), queries, keys, values)
    assert difference(actual, F.scaled_dot_product_attention(queries, keys, values, scale=0.7)) < tolerance


@quick
@given(seeds, sizes, sizes, st.integers(1, 9), axes, st.randoms(use_true_random=False))
def test_permuted_queries_permute_the_output_and_permuted_keys_leave_it(seed, n, m, half_steps, last, random):
    scores, values = 2 * normal(seed, 2, 3, n, m), normal(seed + 1, 2, 3, m, 4)
    sinkhorn = Sinkhorn(half_steps, last)
    rows, columns = random.sample(range(n), n), random.sample(range(m), m)
    actual = sinkhorn(scores[..., rows, :][..., columns], values=values[..., columns, :])
    assert difference(actual, sinkhorn(scores, values=values)[..., rows, :]) < FLOAT64


@settings(max_examples=150, deadline=None)
@given(st.data(), sizes, sizes, st.integers(1, 125), axes, st.sampled_from([1e2, 1e3, 1e4]))
def test_extreme_scores_give_finite_output_in_float32(data, n, m, half_steps, last, largest):
    # Few distinct points, so that many queries compete for one key and the duals run far apart.
    points = st.sampled_from([-1.0, -0.9, 0.0, 0.1, 1.0])
    queries = torch.tensor(data.draw(st.lists(points, min_size=n, max_size=n))).reshape(1, 1, n, 1)
    keys = torch.tensor(data.draw(st.lists(points, min_size=m, max_size=m))).reshape(1, 1, m, 1)
    scores = largest * queries @ keys.transpose(-1, -2)
    for masked, wide in product((False, True), repeat=2):
        sinkhorn = Sinkhorn(half_steps, last, masked=masked, wide=wide)
        assert torch.isfinite(sinkhorn(scores, values=torch.ones(1, 1, m, 2))).all()
        assert torch.isfinite(sinkhorn(scores)).all()


@pytest.mark.parametrize("half_steps", [0, -1])
def test_fewer_than_one_half_step_is_refused(half_steps):
    with pytest.raises(ValueError, match="half_steps"):
        Sinkhorn(half_steps)


def random_mass(seed, size, one):
    """What rows or columns are scaled to: one number or a vector, never small beside the others."""
    return normal(seed, 1 if one else size).abs() + 0.5


def masses(seed, n, m, one):
    """Marginals of rows and columns with the same total, since a loop alternates between totals that differ."""
    rows, columns = random_mass(seed, n, one), random_mass(seed + 1, m, one)
    return rows, columns * rows.expand(n).sum() / columns.expand(m).sum()


@quick
@given(seeds, sizes, sizes, st.integers(1, 41), axes, st.booleans())
def test_the_loop_scales_to_the_masses_that_it_is_given(seed, n, m, half_steps, last, one):
    scores, (rows, columns) = 2 * normal(seed, 2, 3, n, m), masses(seed + 1, n, m, one)
    expected = scores.exp()
    axis = first_axis(half_steps, last)
    for _ in range(half_steps):
        if axis == "rows":
            expected, axis = expected * rows[:, None] / expected.sum(dim=-1, keepdim=True), "columns"
        else:
            expected, axis = expected * columns / expected.sum(dim=-2, keepdim=True), "rows"
    reference = sinkhorn_plan_ref(scores, half_steps, last, rows, columns)
    assert difference(reference, expected) < FLOAT64
    sums, mass = (reference.sum(dim=-1), rows) if last == "rows" else (reference.sum(dim=-2), columns)
    assert difference(sums, mass.expand_as(sums)) < FLOAT64


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@quick
@given(
    seeds,
    sizes,
    sizes,
    st.integers(1, 41),
    axes,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 8.0]),
)
def test_the_scaling_form_keeps_to_masses_as_the_reference_does(
    dtype, tolerance, seed, n, m, half_steps, last, one, masked, wide, sharpness
):
    scores, values = (sharpness * normal(seed, 2, 3, n, m)).to(dtype), normal(seed + 1, 2, 3, m, 4).to(dtype)
    rows, columns = (mass.to(dtype) for mass in masses(seed + 2, n, m, one))
    operator = Sinkhorn(half_steps, last, rows, columns, masked=masked, wide=wide)
    expected = sinkhorn_plan_ref(scores, half_steps, last, rows.double(), columns.double())
    assert difference(operator(scores), expected) < tolerance
    assert difference(operator(scores, values=values), expected @ values.double()) < tolerance


@quick
@given(seeds, sizes, sizes, st.integers(1, 9), axes, st.floats(0.1, 10))
def test_a_factor_on_the_mass_of_the_axis_that_is_not_last_changes_nothing(seed, n, m, half_steps, last, factor):
    scores, (rows, columns) = normal(seed, 2, 3, n, m), masses(seed + 1, n, m, one=False)
    other = (rows, factor * columns) if last == "rows" else (factor * rows, columns)
    actual, expected = (Sinkhorn(half_steps, last, *pair)(scores) for pair in (other, (rows, columns)))
    assert difference(actual, expected) < FLOAT64


@quick
@given(seeds, sizes, sizes, st.integers(1, 21), axes, st.booleans(), st.booleans())
def test_the_plan_is_the_attention_to_the_identity(seed, n, m, half_steps, last, weighted, masked):
    scores = 3 * normal(seed, 2, 3, n, m)
    given_masses = masses(seed, n, m, one=False) if weighted else (None, None)
    operator = Sinkhorn(half_steps, last, *given_masses, masked=masked)
    identity = torch.eye(m, dtype=torch.float64).expand(2, 3, m, m)
    assert difference(operator(scores), operator(scores, values=identity)) < FLOAT64


@st.composite
def padded(draw, masks=(-math.inf, -1e9, -1e4)):
    """Scores (3, 2, N, M), -inf outside the live part, what a model would have there, and each sample's live sizes."""
    n, m = draw(sizes), draw(sizes)
    scores = 3 * normal(draw(seeds), 3, 2, n, m)
    marked, plain = scores.clone(), scores.clone()
    sizes_of = [(draw(st.integers(1, n)), draw(st.integers(1, m))) for _ in range(3)]
    mask = draw(st.sampled_from(masks))
    adds = draw(st.booleans())  # masks are added by some models and written by others
    for sample, (rows, columns) in enumerate(sizes_of):
        for where in ((sample, slice(None), slice(rows, None)), (sample, ..., slice(columns, None))):
            marked[where] = -math.inf
            plain[where] = scores[where] + mask if adds else mask
    return marked, plain, sizes_of


def live_parts(tensor, sizes_of):
    return [tensor[sample, :, :rows, :columns] for sample, (rows, columns) in enumerate(sizes_of)]


@quick
@given(padded(), st.integers(1, 21), axes)
def test_masked_queries_and_keys_get_nothing_and_the_others_the_loop_on_them_alone(problem, half_steps, last):
    marked, _, sizes_of = problem
    n, m = marked.shape[-2:]
    reference = sinkhorn_plan_ref(marked, half_steps, last)
    assert torch.equal(reference == 0, marked == -math.inf)
    mass = torch.full((1,), n / m, dtype=torch.float64)
    for part, scores in zip(live_parts(reference, sizes_of), live_parts(marked, sizes_of), strict=True):
        alone = sinkhorn_plan_ref(scores[None], half_steps, last, column_mass=mass)[0]
        assert difference(part, alone) < FLOAT64
        sums, expected = (part.sum(dim=-1), 1.0) if last == "rows" else (part.sum(dim=-2), n / m)
        assert difference(sums, torch.full_like(sums, expected)) < FLOAT64


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@quick
@given(padded(), st.integers(1, 21), axes, st.sampled_from([None, 0.3, 2.0]), st.booleans())
def test_the_scaling_form_keeps_masks_of_every_kind_out_of_the_loop(
    dtype, tolerance, problem, half_steps, last, row_mass, wide
):
    marked, plain, sizes_of = problem
    # Rounded first: with a mask added, float32 keeps less of the scores, and none where it is masked.
    plain, marked = plain.to(dtype), marked.to(dtype)
    rows = None if row_mass is None else torch.tensor([row_mass], dtype=dtype)
    operator = Sinkhorn(half_steps, last, rows, masked=True, wide=wide)
    expected = sinkhorn_plan_ref(marked, half_steps, last, None if rows is None else rows.double())
    plan = operator(plain)
    assert (plan[marked == -math.inf] == 0).all()
    assert difference(plan, expected) < tolerance
    if last == "rows":
        for part in live_parts(plan, sizes_of):
            sums = part.sum(dim=-1)
            assert difference(sums, torch.full_like(sums, row_mass or 1.0)) < tolerance
    values = normal(0, 3, 2, plan.shape[-1], 4).to(dtype)
    output = operator(plain, values=values)
    assert difference(output, expected @ values.double()) < tolerance
    # Nothing that padding holds may reach the live outputs.
    for sample, (live_queries, live_keys) in enumerate(sizes_of):
        values[sample, :, live_keys:] = 1e6
        assert (output[sample, :, live_queries:] == 0).all()
    assert torch.equal(operator(plain, values=values), output)


@pytest.mark.parametrize("last", ["rows", "columns"])
@pytest.mark.parametrize("half_steps", [100, 399])
def test_axes_of_unequal_mass_do_not_drive_a_long_loop_out_of_float32(half_steps, last):
    scores = 2 * normal(0, 2, 3, 40, 40)
    rows, columns = torch.full((1,), 1.0), torch.full((1,), 20.0)
    weighted = sinkhorn_plan_ref(scores.float(), half_steps, last, rows.double(), columns.double())
    assert difference(Sinkhorn(half_steps, last, rows, columns)(scores.float()), weighted) < FLOAT32
    # Two keys of 40 that are live carry a twentieth of what the rows do.
    scores[..., 2:] = -math.inf
    expected = sinkhorn_plan_ref(scores.float(), half_steps, last)
    values = normal(1, 2, 3, 40, 4).float()
    operator = Sinkhorn(half_steps, last, masked=True)
    assert difference(operator(scores.float()), expected) < FLOAT32
    assert difference(operator(scores.float(), values=values), expected @ values.double()) < FLOAT32


@quick
@given(seeds, sizes, sizes, st.integers(1, 21), axes, st.booleans(), st.booleans())
def test_the_logarithm_is_that_of_the_plan(seed, n, m, half_steps, last, weighted, masked):
    scores = 3 * normal(seed, 2, 3, n, m)
    given_masses = masses(seed, n, m, one=False) if weighted else (None, None)
    log_plan = Sinkhorn(half_steps, last, *given_masses, masked=masked, logarithm=True)(scores)
    expected = sinkhorn_plan_ref(scores, half_steps, last, *given_masses)
    assert difference(log_plan.exp(), expected) < FLOAT64
    # Relative to the scores: a single key has the logarithm 0.
    assert (log_plan - expected.log()).abs().max() < FLOAT64 * (1 + scores.abs().max())


@quick
@given(seeds, sizes, sizes, st.integers(1, 9), axes)
def test_the_logarithm_holds_where_the_plan_underflows(seed, n, m, half_steps, last):
    # At a distance of hundreds from its neighbours an entry is 0 in float32, and its logarithm is a number.
    scores = torch.full((1, 1, n, m), -500.0, dtype=torch.float64) + normal(seed, 1, 1, n, m)
    scores[..., torch.arange(n), torch.arange(n) % m] = 0
    scores[..., torch.arange(m) % n, torch.arange(m)] = 0
    log_plan = Sinkhorn(half_steps, last, logarithm=True, wide=True)(scores.float())
    f, g = sinkhorn_duals(scores.float().double(), half_steps, last)
    expected = scores.float().double() + f.unsqueeze(-1) + g.unsqueeze(-2)
    assert (log_plan - expected).abs().max() < FLOAT32 * (1 + scores.abs().max())


@quick
@given(padded(), st.integers(1, 9), axes)
def test_the_logarithm_of_a_masked_plan_is_as_good_as_minus_infinity_where_masked(problem, half_steps, last):
    marked, plain, _ = problem
    log_plan = Sinkhorn(half_steps, last, masked=True, logarithm=True)(plain.float())
    assert not log_plan.isnan().any()
    assert difference(log_plan.exp(), sinkhorn_plan_ref(marked.float(), half_steps, last)) < FLOAT32


@quick
@given(seeds, sizes, sizes, st.integers(1, 4), st.sampled_from([1.0, 30.0, 3000.0]), st.booleans())
def test_closures_of_several_estimates_are_those_of_each(seed, n, m, sets, size, masked):
    scores, duals = size * normal(seed, 2, 3, n, m), size * normal(seed + 1, 2, 3, sets, m)
    if masked:  # the last row and column, unless they are alone
        scores[..., n // 2 + 1 :, :] = -math.inf
        scores[..., m // 2 + 1 :] = -math.inf
    rows = masses_of(scores, seed)["row_mass"]
    expected = [column_step(scores, row_step(scores, dual, rows), torch.ones(1)) for dual in duals.unbind(dim=-2)]
    closed = scaled_closures(scores, duals, rows)
    assert closed.isfinite().all()
    assert difference(closed, torch.stack(expected, dim=-2)) < FLOAT64
