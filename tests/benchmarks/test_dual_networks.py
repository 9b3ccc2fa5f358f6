"""The networks of `benchmarks.amortised_tiny`: timed as they were trained, with the symmetries that they claim."""

import pytest
import torch
from helpers.tolerances import FLOAT32, difference

from benchmarks.dual_networks import ENTRIES, KINDS, SIDE, Timed, plans

SETS, TOKENS = 2, 30


def networks(name):
    torch.manual_seed(0)
    scores = 2 * torch.randn(SETS, TOKENS, ENTRIES)
    kind, width = KINDS[name]
    network = kind(scores, width)
    network.free()
    return network, scores


@pytest.mark.parametrize("name", KINDS)
def test_a_network_is_timed_as_it_was_trained(name):
    network, scores = networks(name)
    with torch.no_grad():
        expected = plans(network, scores, half_steps=3)[1]
        for lowering in ("materialised", "interleaved"):
            plan = Timed(network.alone(1), 3, lowering)(scores[1].reshape(1, TOKENS, SIDE, SIDE))
            assert difference(plan.reshape(TOKENS, ENTRIES), expected) < FLOAT32


@pytest.mark.parametrize("name", KINDS)
def test_what_rows_and_columns_are_shifted_by_changes_no_plan(name):
    network, scores = networks(name)
    shift = torch.randn(SETS, TOKENS, SIDE, 1) + torch.randn(SETS, TOKENS, 1, SIDE)
    with torch.no_grad():
        plan, shifted = (plans(network, each, half_steps=1) for each in (scores, scores + shift.flatten(-2)))
    assert difference(shifted, plan) < FLOAT32


@pytest.mark.parametrize("name", KINDS)
def test_shared_weights_and_no_others_take_permuted_scores_to_the_dual_permuted_alike(name):
    network, scores = networks(name)
    rows, columns = [2, 0, 3, 1], [1, 3, 0, 2]
    permuted = scores.unflatten(-1, (SIDE, SIDE))[..., rows, :][..., columns].flatten(-2)
    with torch.no_grad():
        alike = difference(network(permuted), network(scores)[..., rows]) < FLOAT32
    assert alike == name.startswith("shared")
