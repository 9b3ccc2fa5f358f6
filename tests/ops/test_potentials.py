import ot
import pytest
import torch
from helpers.tolerances import FLOAT32, FLOAT64, LP, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.ops.potentials import paired_keys, potentials, potentials_ref

quick = settings(max_examples=60, deadline=None)
# Whole numbers tie often, fractions seldom.
coordinates = st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10, width=32, allow_subnormal=False))


def points():
    return st.lists(coordinates, min_size=1, max_size=12).map(torch.tensor).map(torch.Tensor.double)


def largest_score(x, y):
    return 1 + (x.abs().max() * y.abs().max()).item()


def same(actual, expected, x, y):
    # Relative to the scores: the potentials themselves may be zero.
    return (actual - expected).abs().max() < FLOAT64 * largest_score(x, y)


def c_transform(duals, scores):
    """Largest duals of the other side with scores + f + g <= 0; reduces the first axis of the scores."""
    return -(scores + duals.unsqueeze(-1)).amax(dim=0)


@quick
@given(points(), points())
def test_there_is_no_duality_gap_to_an_independent_solver(x, y):
    scores = x.unsqueeze(-1) * y
    f = potentials_ref(x, y)
    g = c_transform(f, scores)
    # The solver gives up on a single query with a negative cost, so the costs are lifted above zero.
    lift = scores.max()
    transport = ot.emd2(ot.unif(len(x)), ot.unif(len(y)), (lift - scores).numpy()) - lift
    assert (scores + f.unsqueeze(-1) + g).max() < LP * largest_score(x, y)
    assert abs(f.mean() + g.mean() - transport) < LP * largest_score(x, y)


@quick
@given(points(), points())
def test_the_potential_is_its_own_double_c_transform(x, y):
    # The feasible duals are already the largest ones, on every query, also where the plan is not unique.
    scores = x.unsqueeze(-1) * y
    f = potentials_ref(x, y)
    actual = c_transform(c_transform(f, scores), scores.T)
    assert same(actual, f, x, y)


def test_two_points_by_hand():
    x, y = torch.tensor([0.0, 1.0]), torch.tensor([4.0, 2.0])
    # The slope is the midpoint of the keys, 3, and falls: high queries need little help to win high keys.
    assert potentials(x, y).tolist() == [1.5, -1.5]
    assert potentials_ref(x, y).tolist() == [1.5, -1.5]


def test_a_query_quantile_inside_one_key_takes_that_key_for_slope():
    # Halfway through three keys lies the middle one.
    assert paired_keys(2, 3) == ([1], [1])
    assert potentials(torch.tensor([0.0, 1.0]), torch.tensor([-5.0, 2.0, 9.0])).tolist() == [1.0, -1.0]


@quick
@given(st.integers(1, 50), st.integers(1, 50))
def test_paired_keys_are_the_same_or_neighbours_and_never_fall(queries, keys):
    lower, upper = paired_keys(queries, keys)
    assert len(lower) == len(upper) == queries - 1
    assert all(0 <= low <= high <= min(low + 1, keys - 1) for low, high in zip(lower, upper, strict=True))
    assert lower == sorted(lower)
    assert upper == sorted(upper)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_potentials_equal_the_reference(dtype, tolerance, n, m, seed, tied):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, n, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 3, m, generator=generator, dtype=torch.float64)
    if tied:
        x, y = x.round(), y.round()
    x, y = x.to(dtype), y.to(dtype)
    actual = potentials(x, y)
    assert actual.dtype == dtype
    assert difference(actual, potentials_ref(x, y)) < tolerance


@quick
@given(points(), points(), st.randoms(use_true_random=False))
def test_permuted_queries_permute_the_potential_and_permuted_keys_leave_it(x, y, random):
    rows, columns = random.sample(range(len(x)), len(x)), random.sample(range(len(y)), len(y))
    for function in (potentials, potentials_ref):
        assert same(function(x[rows], y[columns]), function(x, y)[rows], x, y)


@quick
@given(points(), points())
def test_potentials_are_centred_and_equal_on_equal_queries(x, y):
    for function in (potentials, potentials_ref):
        f = function(x, y)
        assert same(f.mean(), torch.tensor(0.0), x, y)
        for value in x.unique():
            assert same(f[x == value], f[x == value][0], x, y)


@quick
@given(points(), points(), st.floats(-10, 10))
def test_a_shift_of_the_keys_adds_its_product_with_the_queries(x, y, shift):
    assert same(potentials(x, y + shift), potentials(x, y) - shift * (x - x.mean()), x, y + shift)


@quick
@given(points(), points(), st.floats(-10, 10))
def test_a_shift_of_the_queries_changes_nothing(x, y, shift):
    assert same(potentials(x + shift, y), potentials(x, y), x + shift, y)


@quick
@given(points(), points())
def test_mirrored_points_have_the_same_potential(x, y):
    assert same(potentials(-x, -y), potentials(x, y), x, y)


@quick
@given(st.integers(1, 9), points())
def test_constant_queries_have_potential_zero(n, y):
    for function in (potentials, potentials_ref):
        assert (function(torch.full((n,), 0.3, dtype=torch.float64), y) == 0).all()


@quick
@given(points(), st.integers(1, 9))
def test_constant_keys_give_a_line(x, m):
    y = torch.full((m,), 0.3, dtype=torch.float64)
    for function in (potentials, potentials_ref):
        assert same(function(x, y), -0.3 * (x - x.mean()), x, y)
