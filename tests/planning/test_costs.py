"""What operators take, counted by hand: two samples of three heads, four queries, five keys, a head size of six."""

from dataclasses import replace
from itertools import pairwise
from math import inf, log2

import pytest
import torch
from helpers.fitted import site

from asapc.ops.amortised import AmortisedSinkhorn
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.ops.small import SmallSinkhorn
from asapc.planning.costs import Shape, estimate, share_of_exact, shipped, work
from asapc.types.choices import AmortisedParams, Candidate, Choice, Selection, SlicedDualParams

SHAPE = Shape(batch=2, heads=3, queries=4, keys=5, head_dim=6)
MATRICES = 2 * 3
ENTRIES = MATRICES * 4 * 5
COORDINATES = 4
SCORES = {"call": 1, "product": ENTRIES * 2 * 6, "softmax": ENTRIES}  # a product and a sum for each axis of the head


def half_steps(count):
    """Work of half-steps on a matrix that is there."""
    return {"loop": min(count, 1), "half_step": count, "vector": MATRICES * count, "matvec": ENTRIES * count}


def sliced_dual(features, slices=0, hinges=(0, 0), **params):
    """Parameters of one closure step, whose first map is over so many features."""
    bases = (torch.ones(3, 6, COORDINATES),) * 2
    weights = torch.ones(3, features), torch.ones(3, features + 1)
    return SlicedDualParams(*bases, slices, torch.ones(3, *hinges), weights, **params)


def test_an_exact_operator_takes_the_scores_once_and_a_product_for_each_further_half_step():
    assert work(SHAPE, Sinkhorn(5)) == {**SCORES, "pass": 0, **half_steps(4)}


def test_masks_and_levelling_on_both_axes_take_passes_over_the_scores():
    truncated = Sinkhorn(3, masked=True, wide=True)
    assert work(SHAPE, truncated, masked=True) == {**SCORES, "pass": (1 + 3) * ENTRIES, **half_steps(2)}


def test_a_wide_kernel_takes_up_its_vectors_after_every_twenty_half_steps():
    assert work(SHAPE, Sinkhorn(20, wide=True))["pass"] == 3 * ENTRIES
    assert work(SHAPE, Sinkhorn(100, wide=True))["pass"] == (3 + 2 * 4) * ENTRIES
    assert work(SHAPE, Sinkhorn(100))["pass"] == 0


def test_a_transposition_takes_a_pass_over_the_scores():
    assert work(SHAPE, Sinkhorn(4), transposed=True)["pass"] == ENTRIES
    assert work(SHAPE, Sinkhorn(4), masked=True, transposed=True)["pass"] == 2 * ENTRIES


def test_a_dual_of_the_keys_takes_their_features_and_all_of_its_half_steps():
    operator = SlicedDual(sliced_dual(features=2 + COORDINATES + 1 + 2 * 7, slices=2, hinges=(2, 7)))
    points = MATRICES * (5 + 4) * COORDINATES
    assert work(SHAPE, operator) == {
        **SCORES,
        "pass": 0,
        **half_steps(3 + 2),  # from keys to rows, and the closure step
        "estimate": 1,
        "paired": 0,
        "form": 0,
        "coordinate": points,
        "project": points * 6,
        "hinge": MATRICES * 5 * 2 * 7,  # at the keys alone
        "sort": MATRICES * 2 * (5 * log2(5) + 4 * 2),
    }


def test_one_pass_takes_an_estimate_and_adds_it_to_the_scores():
    weights = (torch.ones(3, COORDINATES + 1),)
    params = replace(sliced_dual(features=COORDINATES + 1), weights=weights, one_pass=True)
    points = MATRICES * (5 + 4) * COORDINATES
    nothing = {"paired": 0, "form": 0, "hinge": 0, "sort": 0}
    estimated = {"estimate": 1, "coordinate": points, "project": points * 6, **nothing}
    assert work(SHAPE, SlicedDual(params)) == {**SCORES, "pass": ENTRIES, **half_steps(0), **estimated}
    assert work(SHAPE, SlicedDual(params, lowering="fused")) == {
        "call": 1,
        "fused_call": 1,
        "fused_softmax": ENTRIES,
        "narrow_call": 0,
        "narrow_softmax": 0,
        "fused_product": ENTRIES * (7 + 6),  # with the bias as one more channel
        **estimated,
    }


def test_a_dual_of_the_queries_takes_a_transposition_and_one_in_the_kernel_a_half_step_less():
    pairs = 4 * 3 // 2
    params = sliced_dual(features=COORDINATES + 1 + 2 * pairs, side="queries", paired=True)
    points = MATRICES * (4 + 5) * COORDINATES
    assert work(SHAPE, SlicedDual(params, wide=True), transposed=True) == {
        **SCORES,
        "pass": (1 + 1) * ENTRIES,  # the transposition, and the estimate as a bias
        **half_steps(2 + 2 - 1),
        "estimate": 1,
        "paired": 1,
        "form": MATRICES * 4 * 2 * COORDINATES,  # at the queries alone, for two maps
        "coordinate": points,
        "project": points * 6,
        "hinge": 0,
        "sort": 0,
    }


def test_fused_passes_take_products_with_one_column_and_the_last_with_the_values():
    fused = {
        "call": 1,
        "fused_call": 5,
        "fused_product": ENTRIES * (4 * (7 + 1) + (7 + 6)),  # a bias is one more axis of the head
        "fused_softmax": ENTRIES * 5,
        "narrow_call": 4,
        "narrow_softmax": ENTRIES * 4,
    }
    assert work(SHAPE, Sinkhorn(5, lowering="fused")) == fused
    params = sliced_dual(features=COORDINATES + 1)
    estimated = work(SHAPE, SlicedDual(params, lowering="fused"))
    assert {kind: estimated[kind] for kind in fused} == fused
    assert set(estimated) - set(fused) == {"estimate", "paired", "form", "coordinate", "project", "hinge", "sort"}


def test_an_estimate_is_the_sum_of_all_work_in_milliseconds():
    sizes = {"heads": 3, "queries": 4, "keys": 5, "head_dim": 6}
    costs = shipped().milliseconds
    expected = sum(count * costs[kind] for kind, count in work(SHAPE, Sinkhorn(5)).items())
    assert estimate(site(**sizes), Sinkhorn(5), 2, shipped()) == pytest.approx(expected)


def test_a_selection_that_keeps_a_loop_has_no_share_of_the_exact_forms_time():
    exact, half, kept = (Candidate(name, 5, cost) for name, cost in (("exact", 4.0), ("truncated", 2.0), ("keep", inf)))
    choices = [Choice(candidate, "", (half, exact)) for candidate in (exact, half, kept)]
    assert share_of_exact(Selection({"a": choices[0], "b": choices[1]})) == pytest.approx(6 / 8)
    assert share_of_exact(Selection({"a": choices[0], "b": choices[2]})) is None


def test_scores_that_are_products_are_made_transposed_and_others_have_to_be_turned():
    sizes = {"heads": 3, "queries": 4, "keys": 5, "head_dim": 6}
    for half_steps_taken, passes in ((4, 1), (5, 0)):  # an even number that ends on rows begins on columns
        product, other = (
            estimate(site(**sizes, is_scores=is_scores), Sinkhorn(half_steps_taken), 2, shipped())
            for is_scores in (True, False)
        )
        assert other - product == pytest.approx(passes * ENTRIES * shipped().milliseconds["pass"])


@pytest.mark.parametrize(("lowering", "each"), [("materialised", 4 * 5), ("interleaved", 1)])
def test_small_matrices_take_a_product_and_a_division_a_half_step(lowering, each):
    """Packed, each entry is the sum of all of its matrix, most of them times zero."""
    operator = SmallSinkhorn(7, "rows", (4, 5), lowering=lowering)
    taken = {"half_step": 7, "product": ENTRIES * (2 * 6 + 7 * each), "pass": 7 * ENTRIES}
    assert work(SHAPE, operator) == {**SCORES, **taken}


def test_a_network_takes_its_layers_beside_its_half_steps():
    sizes = (20, 8, 8, 5)
    weights = tuple(torch.ones(out, into) for into, out in pairwise(sizes))
    operator = AmortisedSinkhorn(
        AmortisedParams(weights, tuple(torch.ones(out) for out in sizes[1:])), 3, "rows", (4, 5), lowering="interleaved"
    )
    assert work(SHAPE, operator) == {
        **SCORES,
        "half_step": 3 + 3 + 2,  # and an exponential, and what bounds it
        "product": ENTRIES * (2 * 6 + 3) + MATRICES * (20 * 8 + 8 * 8 + 8 * 5),
        "pass": 3 * ENTRIES + 2 * ENTRIES + MATRICES * (8 + 8),
    }
