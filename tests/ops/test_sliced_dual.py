import math
from itertools import product

import pytest
import torch
from helpers.masses import masses_of, of_first
from helpers.tolerances import FLOAT32, FLOAT64, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.ops.c_transform import column_step, plan, row_step
from asapc.ops.features import dual_features, dual_features_ref, estimate, live_mask, pair_matrices, project
from asapc.ops.sinkhorn import sinkhorn_plan_ref
from asapc.ops.sliced_dual import SlicedDual, bias_side, first_half_steps, sliced_dual_plan_ref, target_dual, with_log
from asapc.types.choices import SlicedDualParams

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
HEADS, DIM = 3, 4


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32), most_slices=DIM, axes=("rows", "columns")):
    """Random parameters of 1 to 4 sets of weights, or of one pass; scores, queries, keys, values; the last axis.

    All tensors have one dtype.
    """
    dtype = draw(st.sampled_from(dtypes))
    n, m, slices = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, most_slices))
    last, one_pass = draw(st.sampled_from(axes)), draw(st.booleans())
    sets = 1 if one_pass else draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    coordinates, pieces = draw(st.integers(0, DIM)), draw(st.integers(0, 3))
    paired = draw(st.booleans())
    features = slices + DIM + 1 + coordinates * pieces + paired * DIM * (DIM - 1)
    params = SlicedDualParams(
        query_basis=normal(HEADS, DIM, DIM) / 2,
        key_basis=normal(HEADS, DIM, DIM) / 2,
        slices=slices,
        knots=normal(HEADS, coordinates, pieces),
        weights=tuple(normal(HEADS, features + step) / features for step in range(sets)),
        side=bias_side(last) if one_pass else draw(st.sampled_from(["queries", "keys"])),
        paired=paired,
        one_pass=one_pass,
    )
    queries, keys, values = normal(2, HEADS, n, DIM), normal(2, HEADS, m, DIM), normal(2, HEADS, m, 5)
    # A bias on some: the scores need not be a multiple of q.k.
    bias = normal(n, m) if draw(st.booleans()) else 0
    return params, scale_of(dtype) * queries @ keys.transpose(-1, -2) + bias, queries, keys, values, last


def scale_of(dtype):
    return torch.tensor([0.5, 1.0, 2.0], dtype=dtype)[:, None, None]


def tolerance(tensor):
    return FLOAT64 if tensor.dtype == torch.float64 else FLOAT32


@settings(max_examples=150, deadline=None)
@given(cases(), seeds)
def test_the_operator_equals_its_reference(case, seed):
    params, scores, queries, keys, values, last = case
    masses = masses_of(scores, seed)
    expected = sliced_dual_plan_ref(scores, queries, keys, params, last, **masses)
    for masked, wide in product({False, params.slices == 0}, (False, True)):
        operator = SlicedDual(params, last, masked, **masses, wide=wide)
        plan, output = operator(scores, queries, keys), operator(scores, queries, keys, values)
        assert plan.dtype == output.dtype == queries.dtype
        assert difference(plan, expected) < tolerance(queries)
        assert difference(output, expected @ values.double()) < tolerance(queries)


@quick
@given(cases(most_slices=2, axes=["rows"]), seeds)
def test_the_fused_form_equals_the_reference(case, seed):
    params, _, queries, keys, values, _ = case
    scaled = scale_of(queries.dtype) * queries
    scores = scaled.double() @ keys.double().transpose(-1, -2)
    masses = masses_of(scores.to(queries.dtype), seed)
    expected = sliced_dual_plan_ref(scores, queries, keys, params, **masses) @ values.double()
    actual = SlicedDual(params, **masses, lowering="fused").from_points(scaled, queries, keys, values)
    assert actual.dtype == queries.dtype
    assert difference(actual, expected) < tolerance(queries)


@quick
@given(cases(most_slices=0, axes=["rows"]), st.integers(1, 9), seeds)
def test_the_fused_form_of_masked_keys_equals_that_without_them(case, count, seed):
    params, _, queries, keys, values, _ = case
    count = min(count, keys.shape[-2])
    scaled = scale_of(queries.dtype) * queries
    scores = scaled.double() @ keys[..., :count, :].double().transpose(-1, -2)
    masses = masses_of(queries @ keys.transpose(-1, -2), seed)
    of_live = of_first(masses, queries.shape[-2], count)
    expected = sliced_dual_plan_ref(scores, queries, keys[..., :count, :], params, **of_live)
    expected = expected @ values[..., :count, :].double()
    live = (torch.arange(keys.shape[-2]) < count).to(queries.dtype).expand(2, HEADS, 1, -1)
    actual = SlicedDual(params, **masses, lowering="fused").from_points(scaled, queries, keys, values, live)
    assert difference(actual, expected) < tolerance(queries)


@quick
@given(cases())
def test_features_equal_their_reference(case):
    params, _, queries, keys, _, _ = case
    x, y = project(queries, params.query_basis), project(keys, params.key_basis)
    actual = dual_features(x, y, params.slices, params.knots, params.paired)
    assert actual.shape == (2, HEADS, params.weights[0].shape[-1], queries.shape[-2])
    # Each is determined up to a constant over the points.
    actual = actual - actual.mean(dim=-1, keepdim=True)
    expected = dual_features_ref(x, y, params.slices, params.knots, params.paired)
    assert difference(actual, expected - expected.mean(dim=-1, keepdim=True)) < tolerance(queries)


@quick
@given(cases(dtypes=[torch.float64]), st.booleans())
def test_an_estimate_is_the_features_times_the_weights(case, masked):
    params, _, queries, keys, _, _ = case
    x, y = project(queries, params.query_basis), project(keys, params.key_basis)
    slices = 0 if masked else params.slices
    weights = params.weights[0][:, None, params.slices - slices :]
    live = [(torch.arange(p.shape[-1]) <= p.shape[-1] // 2).double().expand(2, HEADS, 1, -1) for p in (x, y)]
    live = live if masked else []
    expected = weights @ dual_features(x, y, slices, params.knots, params.paired, *live)
    pairs = None
    if params.paired:
        before, after = slices + DIM + 1, slices + DIM + 1 + DIM * (DIM - 1)
        pairs = pair_matrices(weights[..., before:after], DIM)
        weights = torch.cat([weights[..., :before], weights[..., after:]], dim=-1)
    assert difference(estimate(x, y, slices, params.knots, weights, pairs, *live), expected) < FLOAT64


def test_projection_takes_the_columns_of_the_basis_for_directions():
    points, basis = torch.randn(2, HEADS, 5, DIM), torch.randn(HEADS, DIM, DIM)
    expected = torch.einsum("bhnd,hdl->bhln", points, basis)
    assert difference(project(points, basis), expected) < FLOAT32


@quick
@given(cases(), seeds)
def test_the_last_axis_of_the_plan_has_its_marginal(case, seed):
    params, scores, queries, keys, _, last = case
    masses = masses_of(scores, seed)
    plan = SlicedDual(params, last, **masses)(scores, queries, keys)
    assert (plan >= 0).all()
    sums, mass = plan.sum(dim=-1 if last == "rows" else -2), masses[f"{last[:-1]}_mass"]
    assert difference(sums, torch.ones_like(sums) * (1 if mass is None else mass)) < tolerance(queries)


@quick
@given(cases(dtypes=[torch.float64]))
def test_the_plan_is_the_attention_to_the_identity(case):
    params, scores, queries, keys, _, last = case
    operator, m = SlicedDual(params, last), keys.shape[-2]
    identity = torch.eye(m, dtype=keys.dtype).expand(2, HEADS, m, m)
    assert difference(operator(scores, queries, keys), operator(scores, queries, keys, identity)) < FLOAT64


@quick
@given(cases(dtypes=[torch.float64]), st.randoms(use_true_random=False))
def test_permuted_queries_permute_the_output_and_permuted_keys_leave_it(case, random):
    params, scores, queries, keys, values, last = case
    n, m = queries.shape[-2], keys.shape[-2]
    rows, columns = random.sample(range(n), n), random.sample(range(m), m)
    operator = SlicedDual(params, last)
    permuted = scores[..., rows, :][..., columns]
    actual = operator(permuted, queries[..., rows, :], keys[..., columns, :], values[..., columns, :])
    assert difference(actual, operator(scores, queries, keys, values)[..., rows, :]) < FLOAT64


@quick
@given(cases(dtypes=[torch.float64]), st.booleans())
def test_the_vectors_are_the_features_and_every_closure_so_far(case, wide):
    params, scores, queries, keys, _, last = case
    vectors = SlicedDual(params, last, wide=wide).vectors(scores, queries, keys)
    x, y = project(queries, params.query_basis), project(keys, params.key_basis)
    oriented, points, others = (scores, y, x) if params.side == "keys" else (scores.transpose(-1, -2), x, y)
    expected = list(dual_features_ref(points, others, params.slices, params.knots, params.paired).unbind(dim=-2))
    for weights in params.weights:
        estimate = torch.einsum("hf,bhfm->bhm", weights, torch.stack(expected, dim=-2))
        expected.append(column_step(oriented, row_step(oriented, estimate)))
    expected = torch.stack(expected, dim=-2)
    # A constant over the points is free.
    vectors = vectors - vectors.mean(dim=-1, keepdim=True)
    assert difference(vectors, expected - expected.mean(dim=-1, keepdim=True)) < FLOAT64


def test_without_weights_the_vectors_are_the_features():
    basis = torch.eye(DIM).repeat(HEADS, 1, 1)
    operator = SlicedDual(SlicedDualParams(basis, basis, slices=2, knots=torch.zeros(HEADS, 0, 0)))
    given_points = torch.randn(2, HEADS, 5, 7), torch.randn(2, HEADS, 5, DIM), torch.randn(2, HEADS, 7, DIM)
    expected = dual_features(*(points.transpose(-1, -2) for points in given_points[:0:-1]), 2, operator.knots)
    assert difference(operator.vectors(*given_points), expected) < FLOAT32


@quick
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["queries", "keys"]),
    st.sampled_from(["rows", "columns"]),
)
def test_the_teachers_own_dual_gives_the_teachers_plan(seed, n, m, side, last):
    """The target of the fit: the dual so many half-steps before the end, with these taken, is the loop itself."""
    scores = 3 * torch.randn(2, HEADS, n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    masses = masses_of(scores, seed)
    row_mass, column_mass = masses.values()
    own_mass = column_mass if side == "keys" else row_mass
    for half_steps, one_pass in product((3, 4, 7, 10), {False, side == bias_side(last)}):
        f = g = with_log(target_dual(scores, half_steps, side, last, one_pass, **masses), own_mass)
        axes = ["rows", "columns", "rows"] if side == "keys" else ["columns", "rows", "columns"]
        for axis in axes[: first_half_steps(side, last, one_pass)]:
            f, g = (row_step(scores, g, row_mass), g) if axis == "rows" else (f, column_step(scores, f, column_mass))
        assert axis == last
        assert difference(plan(scores, f, g), sinkhorn_plan_ref(scores, half_steps, last, **masses)) < FLOAT64


@quick
@given(cases(dtypes=[torch.float32]), st.sampled_from([1e2, 1e3, 1e4]))
def test_extreme_scores_give_finite_output_in_float32(case, largest):
    params, scores, queries, keys, values, last = case
    factor = largest / scores.abs().max()
    output = SlicedDual(params, last)(scores * factor, queries * factor, keys, values)
    assert torch.isfinite(output).all()


@quick
@given(cases(dtypes=[torch.float32]), st.sampled_from(["queries", "keys"]))
def test_constant_points_give_finite_output(case, constant):
    params, _, queries, keys, values, last = case
    if constant == "queries":
        queries = queries[..., :1, :].expand_as(queries)
    else:
        keys = keys[..., :1, :].expand_as(keys)
    scores = scale_of(torch.float32) * queries @ keys.transpose(-1, -2)
    assert torch.isfinite(SlicedDual(params, last)(scores, queries, keys, values)).all()


def test_one_pass_needs_the_dual_that_is_a_bias_of_the_last_softmax():
    for last in ("rows", "columns"):
        assert first_half_steps(bias_side(last), last, one_pass=True) == 1
    with pytest.raises(ValueError, match="one pass that ends on rows needs the dual of the keys"):
        first_half_steps("queries", "rows", one_pass=True)


def test_one_pass_takes_one_call_of_fused_attention(monkeypatch):
    calls = []
    monkeypatch.setattr("asapc.ops.fused.attention", lambda *points: calls.append(points) or torch.zeros(1, 1, 5, 6))
    basis = torch.eye(DIM).unsqueeze(0)
    weights = (torch.ones(1, DIM + 1),)
    params = SlicedDualParams(basis, basis, 0, torch.zeros(1, 0, 0), weights, one_pass=True)
    SlicedDual(params, lowering="fused").from_points(*(torch.randn(1, 1, 5, size) for size in (DIM, DIM, DIM, 6)))
    assert len(calls) == 1


def test_the_reference_refuses_tensors_that_do_not_fit_each_other():
    basis = torch.eye(DIM).repeat(HEADS, 1, 1)
    params = SlicedDualParams(basis, basis, 0, torch.zeros(HEADS, 0, 0), (torch.ones(HEADS, DIM + 1),))
    points = torch.randn(2, HEADS, 5, DIM)
    with pytest.raises(ValueError, match="axis M"):
        sliced_dual_plan_ref(torch.randn(2, HEADS, 5, 5), points, points[..., :4, :], params)


MASKS = st.sampled_from([-math.inf, -1e9, -1e4])


def with_padding(case, more_queries, more_keys, mask):
    """The case with masked queries and keys appended, whatever these hold."""
    _, scores, queries, keys, values, _ = case
    n, m = scores.shape[-2:]
    padded = torch.full((*scores.shape[:2], n + more_queries, m + more_keys), mask, dtype=scores.dtype)
    padded[..., :n, :m] = scores
    points = (
        torch.cat([t, 10 * torch.randn(*t.shape[:2], more, t.shape[-1], dtype=t.dtype)], dim=-2)
        for t, more in ((queries, more_queries), (keys, more_keys), (values, more_keys))
    )
    return padded, *points


@settings(max_examples=100, deadline=None)
@given(cases(most_slices=0), st.integers(0, 5), st.integers(0, 5), MASKS, seeds)
def test_masked_padding_changes_nothing_for_what_is_live(case, more_queries, more_keys, mask, seed):
    params, scores, queries, keys, values, last = case
    n, m = scores.shape[-2:]
    padded, *points = with_padding(case, more_queries, more_keys, mask)
    masses = masses_of(padded, seed)
    operator = SlicedDual(params, last, masked=True, **masses, wide=more_keys % 2 == 1)
    plan, output = operator(padded, *points[:2]), operator(padded, *points)
    alone = SlicedDual(params, last, **of_first(masses, n, m))
    assert difference(plan[..., :n, :m], alone(scores, queries, keys)) < tolerance(queries)
    assert difference(output[..., :n, :], alone(scores, queries, keys, values)) < tolerance(queries)
    assert (plan[..., n:, :] == 0).all()
    assert (plan[..., m:] == 0).all()
    assert (output[..., n:, :] == 0).all()


@quick
@given(cases(dtypes=[torch.float64], most_slices=0), st.integers(0, 5), st.integers(0, 5), MASKS)
def test_the_vectors_of_masked_points_are_zero_and_the_others_as_without_them(case, more_queries, more_keys, mask):
    params, scores, queries, keys, _, last = case
    live_points = scores.shape[-1 if params.side == "keys" else -2]
    padded, *points = with_padding(case, more_queries, more_keys, mask)
    actual = SlicedDual(params, last, masked=True).vectors(padded, *points[:2])
    expected = SlicedDual(params, last).vectors(scores, queries, keys)
    assert (actual[..., live_points:] == 0).all()
    live = actual[..., :live_points] - actual[..., :live_points].mean(dim=-1, keepdim=True)
    # A constant over the points is free. Relative to the vectors: centred they may be zero.
    error = live - (expected - expected.mean(dim=-1, keepdim=True))
    assert error.norm() < FLOAT64 * (1 + expected.norm())


def test_a_query_or_key_is_live_where_anything_is_not_masked():
    scores = torch.tensor([[0.0, -math.inf, -1e9], [-999.0, -1e4, -1e9], [-1e4, -1e9, -math.inf]])
    rows, columns = live_mask(scores[None, None])
    assert rows.flatten().tolist() == [1.0, 1.0, 0.0]
    assert columns.flatten().tolist() == [1.0, 0.0, 0.0]
