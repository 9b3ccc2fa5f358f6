"""How operators are lowered: as is cheapest, as is asked for, and never into a form that they have not."""

import pytest
import torch
from helpers.fitted import changed, site
from helpers.tolerances import FLOAT64, difference

from asapc.ops.guarded import GuardedSinkhorn, guarded_plan_ref
from asapc.ops.sinkhorn import Sinkhorn, sinkhorn_plan_ref
from asapc.ops.small import SmallSinkhorn
from asapc.planning.costs import shipped
from asapc.planning.operators import MANY, MAX_MATRIX, alike, build, exact_operator, fusable, lower, rivals
from asapc.types.choices import Candidate, Choice, Selection
from asapc.types.site import Floor, Guard

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


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_small_matrices_are_interleaved_where_they_are_many_and_no_gpu_launches_them(provider):
    few, many = (site(heads=heads, queries=4, keys=6, product=None) for heads in (MANY - 1, MANY))
    interleaved = "interleaved" if provider == "cpu" else "materialised"
    for wanted in (None, "materialised", "fused"):
        assert lower(few, exact_operator(few), 1, shipped(provider), wanted).lowering == "materialised"
        assert lower(many, exact_operator(many), 1, shipped(provider), wanted).lowering == interleaved
    assert lower(few, exact_operator(few), 2, shipped(provider)).lowering == interleaved
    own = site(heads=MANY, queries=4, keys=6, product=None, column_mass=torch.rand(6, dtype=torch.float64))
    assert lower(own, exact_operator(own), 1, shipped(provider)).lowering == "materialised"


def test_a_candidate_is_built_in_the_layout_that_it_was_judged_in():
    small = site(heads=MANY, queries=4, keys=4, product=None)
    assert build(small, Candidate("truncated", 4, 1.0, lowering="interleaved")).lowering == "interleaved"


def test_a_truncated_loop_of_small_matrices_keeps_its_constants():
    floor = Floor(1e-3, clamped=False)
    guard = Guard(floor, floor, "plan", "plain", "one", "same")
    small = site(heads=2, queries=4, keys=4, product=None, guard=guard)
    scores = 3 * torch.randn(1, 2, 4, 4, dtype=torch.float64)
    operator = build(small, Candidate("truncated", 3, 1.0))
    assert difference(operator(scores), guarded_plan_ref(scores, 3, "rows", guard)) < FLOAT64


@pytest.mark.parametrize(("queries", "keys", "packed"), [(8, 8, True), (4, 16, True), (5, 13, False), (1, 65, False)])
@pytest.mark.parametrize("guarded", [False, True])
def test_plans_of_more_than_64_entries_take_the_general_form(queries, keys, packed, guarded):
    floor = Floor(1e-3, clamped=False)
    guard = Guard(floor, floor, "plan", "plain", "one", "same") if guarded else None
    own = site(7, heads=MANY, queries=queries, keys=keys, product=None, guard=guard)
    operator = lower(own, exact_operator(own), 1, COSTS)
    general = GuardedSinkhorn if guarded else Sinkhorn
    assert type(operator) is (SmallSinkhorn if packed else general)
    assert operator.lowering == ("interleaved" if packed else "materialised")
    scores = 3 * torch.randn(2, 3, queries, keys, dtype=torch.float64)
    ref = sinkhorn_plan_ref(scores, 7) if guard is None else guarded_plan_ref(scores, 7, "rows", guard)
    assert difference(operator(scores), ref) < FLOAT64
    assert type(exact_operator(changed(own, open_lengths=True))) is general
