"""Balanced bases: every score is kept, and what carries most comes first."""

import pytest
import torch
from helpers.fitted import DIM, HEADS, SCALE
from helpers.points import correlated_points, normal, scores_of
from helpers.tolerances import FLOAT64, SOLVE, difference
from hypothesis import given, settings
from hypothesis import strategies as st

from asapc.planning.bases import COVARIANCE_RIDGE, balance, scatter

quick = settings(max_examples=30, deadline=None)


def regularised(covariance):
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return covariance + COVARIANCE_RIDGE * variance[:, None, None] * torch.eye(DIM)


seeds = st.integers(0, 10**6)


@quick
@given(seeds)
def test_the_balanced_bases_keep_every_score(seed):
    queries, keys = correlated_points(seed), correlated_points(seed + 10, tokens=7)
    query_basis, key_basis = balance(scatter(queries), scatter(keys), SCALE)
    actual = (queries @ query_basis) @ (keys @ key_basis).transpose(-1, -2)
    assert difference(actual, scores_of(queries, keys, SCALE)) < SOLVE


@quick
@given(seeds)
def test_in_the_balanced_bases_both_covariances_are_one_falling_diagonal(seed):
    query_scatter, key_scatter = scatter(correlated_points(seed)), scatter(correlated_points(seed + 10))
    query_basis, key_basis = balance(query_scatter, key_scatter, SCALE)
    in_queries = query_basis.transpose(-1, -2) @ regularised(query_scatter) @ query_basis
    in_keys = key_basis.transpose(-1, -2) @ regularised(key_scatter) @ key_basis
    carried = in_queries.diagonal(dim1=-2, dim2=-1)
    assert difference(in_queries, torch.diag_embed(carried)) < SOLVE
    assert difference(in_keys, in_queries) < SOLVE
    assert (carried > 0).all()
    assert (carried.diff(dim=-1) <= 0).all()


def test_scatter_is_the_covariance_within_each_sample_summed_over_samples():
    points = correlated_points(0)
    expected = torch.stack([sum(torch.cov(points[b, h].T, correction=0) for b in range(4)) for h in range(HEADS)])
    assert difference(scatter(points), expected) < FLOAT64


@pytest.mark.parametrize("which", ["queries", "keys", "both"])
@pytest.mark.parametrize("kind", ["zero", "constant", "rank one"])
def test_degenerate_points_have_finite_bases_that_keep_the_scores(which, kind):
    def degenerate(points):
        if kind == "zero":
            return torch.zeros_like(points)
        if kind == "constant":
            return points[..., :1, :].expand_as(points)
        return points[..., :1] * normal(5, HEADS, 1, DIM)

    queries, keys = correlated_points(0), correlated_points(10)
    queries = queries if which == "keys" else degenerate(queries)
    keys = keys if which == "queries" else degenerate(keys)
    query_basis, key_basis = balance(scatter(queries), scatter(keys), SCALE)
    assert torch.isfinite(query_basis).all()
    assert torch.isfinite(key_basis).all()
    actual = (queries @ query_basis) @ (keys @ key_basis).transpose(-1, -2)
    assert difference(actual, scores_of(queries, keys, SCALE)) < SOLVE
