"""What the sites of a graph see, in one layout."""

from math import inf

import pytest
import torch
from helpers.fitted import DIM, HEADS, SCALE, TOKENS, site
from helpers.points import correlated_points, normal, scores_of
from helpers.tolerances import FLOAT64, difference

from asapc.planning.activations import activation
from asapc.types.site import Operand


def test_activations_are_the_graphs_own_values_in_one_layout_with_masks_as_minus_infinity():
    queries, keys = correlated_points(0), correlated_points(10)
    axes = {"query": Operand("query", "bnhd"), "key": Operand("key", "bhdm")}
    values = {"query": queries.transpose(1, 2), "key": keys.transpose(-1, -2), "value": keys}
    scores, seen_queries, seen_keys = activation(site(**axes), values)
    assert difference(scores, scores_of(queries, keys, SCALE)) < FLOAT64
    assert torch.equal(seen_queries, queries)
    assert torch.equal(seen_keys, keys)
    held = scores_of(queries, keys, torch.ones(HEADS, dtype=torch.float64))
    held[..., 5:] -= 1e9
    biased = site(**axes, is_scores=False, masked=True)
    scores, *_ = activation(biased, {**values, "scores": held})
    assert (scores[..., 5:] == -inf).all()
    assert difference(scores[..., :5], scores_of(queries, keys[..., :5, :], SCALE)) < FLOAT64


def test_queries_that_all_samples_share_are_fitted_too():
    learned, keys = normal(0, HEADS, TOKENS, DIM), correlated_points(10)
    shared = site(query=Operand("query", "hnd"))
    values = {"query": learned, "key": keys, "value": keys}
    scores, queries, _ = activation(shared, values)
    assert queries.shape == (4, HEADS, TOKENS, DIM)
    assert difference(scores, scores_of(learned.expand(4, -1, -1, -1), keys, SCALE)) < FLOAT64


def test_a_site_without_queries_and_keys_cannot_be_fitted():
    values = {"scores": normal(0, 4, HEADS, TOKENS, TOKENS), "value": normal(0, 4, HEADS, TOKENS, DIM)}
    with pytest.raises(ValueError, match="attention"):
        activation(site(product=None), values)
