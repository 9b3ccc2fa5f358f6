"""How operators are lowered: as is cheapest, as is asked for, and never into a form that they have not."""

import pytest
import torch
from helpers.fitted import site

from asapc.ops.sinkhorn import Sinkhorn
from asapc.planning.costs import shipped
from asapc.planning.operators import MAX_MATRIX, alike, fusable, lower, rivals
from asapc.types.choices import Candidate, Choice, Selection

LENGTH, COSTS = 512, shipped()


def plain(**changes):
    """A site of plain products of 8 heads of 64."""
    sizes = {"heads": 8, "head_dim": 64, "queries": LENGTH, "keys": LENGTH}
    return site(40, **{**sizes, **changes})


def test_short_sites_get_a_matrix_and_long_ones_none():
    assert lower(plain(), Sinkhorn(3), 1, COSTS).lowering == "materialised"
    longest = plain(queries=4096, keys=4096)
    assert longest.loop.heads * 4096**2 * 4 > MAX_MATRIX
    assert lower(longest, Sinkhorn(3), 1, COSTS).lowering == "fused"
    # Forty passes that make the scores anew are too many, whatever memory they save.
    assert lower(longest, Sinkhorn(40), 1, COSTS).lowering == "materialised"


def test_the_matrix_of_a_large_batch_counts():
    sizes = [batch for batch in (1, 64) if lower(plain(), Sinkhorn(3), batch, COSTS).lowering == "materialised"]
    assert sizes == [1]


def test_what_is_asked_for_is_taken_where_it_exists():
    assert lower(plain(), Sinkhorn(40), 1, COSTS, "fused").lowering == "fused"
    assert lower(plain(queries=4096, keys=4096), Sinkhorn(40), 1, COSTS, "materialised").lowering == "materialised"
    assert lower(plain(is_scores=False), Sinkhorn(40), 1, COSTS, "fused").lowering == "materialised"


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"is_scores": False}, {}),
        ({"attention": None}, {}),
        ({"masked": True}, {}),
        ({"is_scores": False, "masked": True}, {}),
        ({"logarithm": True}, {}),
        ({}, {"last": "columns"}),
        ({}, {"wide": True}),
    ],
    ids=str,
)
def test_only_plain_products_that_end_on_rows_have_a_fused_form(changes, options):
    assert fusable(plain(), Sinkhorn(40))
    assert fusable(plain(is_scores=False, masked=True, padding=("product", "scores")), Sinkhorn(40))
    assert fusable(plain(row_mass=torch.ones(LENGTH)), Sinkhorn(40, row_mass=torch.ones(LENGTH)))
    assert not fusable(plain(**changes), Sinkhorn(40, **options))


def test_rivals_are_lowered_as_the_compiled_model_is():
    long = plain(queries=4096, keys=4096)
    chosen = Selection({long.name: Choice(Candidate("truncated", 4, 1.0), "")})
    for wanted, expected in ((None, "fused"), ("materialised", "materialised"), ("fused", "fused")):
        result = rivals([long], chosen, 1, COSTS, wanted)
        assert {result[name][long.name].lowering for name in ("truncated", "softmax")} == {expected}


@pytest.mark.parametrize(
    "other", [Sinkhorn(3), Sinkhorn(4, "columns"), Sinkhorn(4, wide=True), Sinkhorn(4, row_mass=torch.tensor([2.0]))]
)
def test_operators_are_alike_where_all_that_they_are_made_of_is(other):
    assert alike({"a": Sinkhorn(4)}, {"a": Sinkhorn(4)})
    assert not alike({"a": Sinkhorn(4)}, {"a": other})
    assert not alike({"a": Sinkhorn(4)}, {})
