"""What the planner chooses, on sites and candidates whose cost and error are known."""

from dataclasses import replace
from itertools import product
from math import nan

import pytest
import torch
from helpers.fitted import cached_teacher, site, sound
from helpers.tolerances import FLOAT32, difference

from asapc.config import CompileConfig
from asapc.fidelity.sites import candidate_fidelity
from asapc.ops.sinkhorn import sinkhorn_plan_ref
from asapc.planning.alternatives import judge
from asapc.planning.check import Check
from asapc.planning.choose import MARGIN, choose, choose_operator, decide, repair, sites_that_miss
from asapc.planning.costs import shipped
from asapc.planning.front import front, gain, next_step
from asapc.planning.operators import build, operators, rivals
from asapc.planning.propose import TRUNCATED, enough, feature_sets, propose, split
from asapc.types.choices import Alternatives, Candidate, Choice, Selection
from asapc.types.results import Fidelity, SiteFidelity


def candidate(operator, cost, relc, half_steps=5, column=0.0):
    return Candidate(operator, half_steps, cost, SiteFidelity(relc, 0.0, 0.0, column))


EXACT = candidate("exact", 10.0, 1e-7, half_steps=40)
ROUGH, CLOSE = candidate("sliced_dual", 3.0, 0.2), candidate("sliced_dual", 5.0, 0.05, half_steps=7)
SLOW, CHEAP = candidate("sliced_dual", 9.8, 0.01), candidate("truncated", 2.0, 0.9, half_steps=3)
ALL = [EXACT, ROUGH, CLOSE, SLOW, CHEAP]
DEFAULT = CompileConfig()


def test_the_cheapest_that_keeps_the_budget_is_chosen():
    assert choose_operator(site(40), ALL, DEFAULT).candidate is CLOSE
    assert choose_operator(site(40), ALL, CompileConfig(fidelity=("relc<=0.3",))).candidate is ROUGH


def test_what_saves_too_little_is_not_worth_an_error():
    assert choose_operator(site(40), ALL, CompileConfig(fidelity=("relc<=0.02",))).candidate is EXACT


def test_a_limit_of_the_budget_is_aimed_at_with_a_margin():
    budget, limit = CompileConfig(fidelity=("relc<=0.1",)), 0.1
    beyond, within = (candidate("sliced_dual", 3.0, share * limit) for share in ((1 + MARGIN) / 2, MARGIN - 0.01))
    assert beyond.fidelity.relc < limit
    assert choose_operator(site(40), [EXACT, beyond], budget).candidate is EXACT
    assert choose_operator(site(40), [EXACT, within], budget).candidate is within


def test_every_term_of_the_budget_counts():
    lopsided = replace(CLOSE, fidelity=replace(CLOSE.fidelity, column_marginal_error=0.5))
    budget = CompileConfig(fidelity=("column-marginal<=0.1",))
    assert choose_operator(site(40), [EXACT, lopsided], budget).candidate is EXACT
    assert choose_operator(site(40), [EXACT, lopsided], DEFAULT).candidate is lopsided


def test_an_error_that_is_nan_keeps_no_budget_and_is_no_step_of_a_front():
    broken = candidate("sliced_dual", 1.0, nan)
    assert choose_operator(site(40), [EXACT, broken], DEFAULT).candidate is EXACT
    assert list(front([broken, EXACT, CLOSE])) == [CLOSE, EXACT]
    assert next_step(Choice(broken, "", (CLOSE, EXACT))) is CLOSE


def test_of_equal_cost_the_operator_with_fewer_half_steps_is_chosen():
    long, short = (candidate("sliced_dual", 3.0, 0.01, half_steps=count) for count in (9, 5))
    assert choose_operator(site(40), [EXACT, long, short], DEFAULT).candidate is short


def test_a_gain_is_a_squared_error_a_millisecond():
    rough, close = candidate("sliced_dual", 1.0, 0.5), candidate("sliced_dual", 5.0, 0.3)
    assert gain(rough, close) == pytest.approx((0.25 - 0.09) / 4)


def test_sites_are_judged_by_the_metrics_of_the_budget_alone():
    """The default's relc does not count where the user's budget is about something else."""
    far = Fidelity(4, 0.0, 0.9, None, {}, (), {}, {"a": SiteFidelity(0.5, 0.0, 0.0, 0.0), "b": CLOSE.fidelity})
    sites = [replace(site(40), name=name) for name in ("a", "b")]
    assert sites_that_miss(sites, far, CompileConfig(fidelity=("agreement>=0.95",))) == ["a", "b"]
    assert sites_that_miss(sites, far, CompileConfig(fidelity=("agreement>=0.95", "relc<=0.1"))) == ["a"]
    assert sites_that_miss(sites, far, DEFAULT) == ["a"]


def test_candidates_are_judged_on_samples_that_were_not_fitted_and_for_the_largest_batch(teacher, monkeypatch):
    asked = {}

    def judge_and_note(graph, sites, candidates, wide, samples, batch, model, lowering):
        asked.update(samples=samples, batch=batch)
        return judge(graph, sites, candidates, wide, samples, batch, model, lowering)

    monkeypatch.setattr("asapc.planning.alternatives.judge", judge_and_note)
    choose(teacher.studied, CompileConfig(batches=(1, 7, 2), pieces=(0,)), shipped())
    choosing, fitted = split(enough(teacher.studied))
    assert asked["batch"] == 7
    for name, value in asked["samples"].inputs.items():
        assert torch.equal(value, choosing.inputs[name])
        assert not torch.equal(value, fitted.inputs[name][: len(value)])


def test_a_site_is_kept_where_even_the_exact_form_fails():
    lost = candidate("exact", 10.0, 0.3)
    choice = choose_operator(site(40), [lost], DEFAULT)
    assert choice.candidate.operator == "keep"
    assert "float32" in choice.reason


def test_the_reason_says_how_close_the_closest_came():
    assert "0.2" in choose_operator(site(40), [EXACT, ROUGH], DEFAULT).reason
    assert "too few" in choose_operator(site(3), [EXACT], DEFAULT).reason


def test_the_front_holds_what_nothing_beats_cheapest_first():
    beaten = candidate("sliced_dual", 6.0, 0.06)
    assert list(front([*ALL, beaten])) == [CHEAP, ROUGH, CLOSE, SLOW, EXACT]


def test_the_next_step_is_closer_and_costs_more():
    curve = tuple(front(ALL))
    assert next_step(Choice(ROUGH, "", curve)) is CLOSE
    assert next_step(Choice(EXACT, "", curve)) is None


@pytest.fixture(scope="module")
def teacher():
    return cached_teacher(sound)


def test_level_one_and_zero_do_not_approximate(teacher):
    for level, operator in ((0, "keep"), (1, "exact")):
        config = CompileConfig(level=level)
        chosen = choose(teacher.studied, config, shipped())
        assert chosen.choices[teacher.site.name].candidate.operator == operator


@pytest.mark.parametrize("factor", [0.1, 1, 3, 10, 30])
def test_level_one_is_the_loop_at_any_scale_of_the_scores(teacher, factor):
    selection = choose(teacher.studied, CompileConfig(level=1), shipped())
    assert selection.wide == {teacher.site.name}
    scores, *points, values = teacher.inputs
    scores = factor * scores
    output = operators([teacher.site], selection)[teacher.site.name](scores, *points, values)
    expected = sinkhorn_plan_ref(scores, teacher.site.loop.half_steps) @ values.double()
    assert difference(output, expected) < FLOAT32


def test_fused_passes_that_are_asked_for_stay_fused_at_level_one(teacher):
    assert choose(teacher.studied, CompileConfig(level=1, lowering="fused"), shipped()).wide == frozenset()


def test_candidates_are_the_exact_form_its_truncations_and_sliced_duals_of_every_feature_set(teacher):
    config = CompileConfig(slices=(0, 2), pieces=(0, 4))
    result = propose(teacher.studied, config)
    candidates = result[teacher.site.name]
    steps = teacher.site.loop.half_steps
    assert candidates[0].operator == "exact"
    truncated = [c.half_steps for c in candidates if c.operator == "truncated"]
    assert truncated == [t for t in TRUNCATED if t < steps]
    sliced = [c for c in candidates if c.operator == "sliced_dual"]
    kinds = {
        (c.params.slices, c.params.knots.numel() > 0, c.params.side, c.params.paired, c.half_steps) for c in sliced
    }
    half_steps = {"keys": (1, 3, 5, 7, 9, 11, 13), "queries": (2, 4, 6, 8, 10, 12)}  # 1 is one pass
    sets = product((0, 2), (False, True), half_steps, (False, True))
    assert kinds == {(*of, t) for of in sets for t in half_steps[of[2]] if t < steps}
    assert len(kinds) == len(sliced)
    assert all(build(teacher.site, c).half_steps == c.half_steps for c in candidates)


@pytest.mark.parametrize(
    ("operators", "kinds"),
    [
        ("one-pass", {"one-pass"}),
        ("hinges,exact", {"hinges"}),
        ("sorted", {"sorted"}),
        ("truncated", {"truncated"}),
        ("one-pass, truncated", {"one-pass", "truncated"}),
        ("exact", set()),
    ],
)
def test_operators_are_restricted_to_those_that_are_asked_for(teacher, operators, kinds):
    config = CompileConfig(operators=operators, pieces=(0,))
    exact, *others = propose(teacher.studied, config)[teacher.site.name]
    assert exact.operator == "exact"

    def kind(candidate):
        if candidate.params is None:
            return candidate.operator
        if candidate.params.one_pass:
            return "one-pass"
        return "sorted" if candidate.params.slices else "hinges"

    assert {kind(candidate) for candidate in others} == kinds


def test_slices_add_operators_and_take_none_away():
    assert CompileConfig().slice_counts() == (0,)
    assert CompileConfig(slices=(8,)).slice_counts() == CompileConfig(slices=(0, 8)).slice_counts() == (0, 8)
    assert CompileConfig(operators="sorted").slice_counts() == (8,)
    assert CompileConfig(operators="sorted", slices=(32,)).slice_counts() == (32,)
    assert CompileConfig(operators="hinges").slice_counts() == (0,)


def test_where_the_exact_form_is_not_allowed_the_closest_operator_stands_in():
    only = CompileConfig(operators="truncated", fidelity=("relc<=0.01",))
    near, far = candidate("truncated", 2.0, 0.1), candidate("truncated", 0.5, 0.4)
    exact = replace(EXACT, cost=1.0)
    choice = choose_operator(site(), [exact, far, near], only)
    assert choice.candidate is near  # dearer than the exact form, too
    assert "--operators" in choice.reason
    assert choose_operator(site(), [exact, far, near], replace(only, fidelity=("relc<=0.2",))).candidate is near
    assert choose_operator(site(), [exact, far, near], replace(only, fidelity=("relc<=0.5",))).candidate is far
    assert choose_operator(site(), [exact], only).candidate is exact  # a site that no other operator serves


def test_masked_and_long_sites_get_no_slices():
    config = CompileConfig(slices=(0, 8), pieces=(0,))
    assert {f.slices for f in feature_sets(site(), config)} == {0, 8}
    assert {f.slices for f in feature_sets(site(masked=True), config)} == {0}
    assert {f.slices for f in feature_sets(site(keys=5000), config)} == {0}
    only_slices = CompileConfig(slices=(8,))
    assert {f.slices for f in feature_sets(site(masked=True), only_slices)} == {0}


def test_a_model_that_misses_the_budget_is_repaired_where_it_helps(teacher):
    candidates = propose(teacher.studied, DEFAULT)[teacher.site.name]
    exact = replace(EXACT, half_steps=teacher.site.loop.half_steps)
    truncated = replace(candidate("truncated", 1.0, 0.9), half_steps=2)
    middle = replace(next(c for c in candidates if c.half_steps == 9), cost=2.0, fidelity=CLOSE.fidelity)
    curve = (truncated, middle, exact)
    name = teacher.site.name
    start = Selection({name: Choice(truncated, "", curve)})
    check = Check(teacher.studied, Alternatives({name: curve}))
    lines = []
    for budget, expected in (("relc<=0.3", middle), ("relc<=1e-5", exact)):
        config = CompileConfig(fidelity=(budget, "agreement>=0"))
        selection = repair(check, start, config, lines.append)
        assert selection.choices[name].candidate is expected, check(selection)
        assert selection.repairs == curve.index(expected)
    assert "held-out" in selection.choices[name].reason
    assert lines


@pytest.fixture
def two_sites():
    """A teacher of two sites, a check, and a selection that truncates both sites: the first by far too much.

    The second lacks one step, which is said to take away more error, for less time.
    """
    teacher = cached_teacher(sound, depth=2)
    _, second = teacher.sites
    exact = [replace(EXACT, half_steps=s.loop.half_steps) for s in teacher.sites]
    rough = candidate("truncated", 5.0, 0.5, half_steps=2), candidate("truncated", 9.9, 0.9, second.loop.half_steps - 1)
    curves = {s.name: pair for s, *pair in zip(teacher.sites, rough, exact, strict=True)}
    check = Check(teacher.studied, Alternatives(curves))
    return teacher, check, Selection({name: Choice(curve[0], "", tuple(curve)) for name, curve in curves.items()})


def half_steps_of(selection, sites):
    return [selection.choices[s.name].candidate.half_steps for s in sites]


def test_a_site_that_misses_its_own_limit_is_repaired_before_all_others(two_sites):
    teacher, check, start = two_sites
    first, second = teacher.sites
    config = CompileConfig(fidelity=("relc<=0.2",))
    errors = check(start).sites
    assert errors[second.name].relc < 0.2 < errors[first.name].relc
    repaired = repair(check, start, config, lambda detail: None)
    assert half_steps_of(repaired, teacher.sites) == [first.loop.half_steps, second.loop.half_steps - 1]
    assert repaired.repairs == 1
    assert repaired.choices[second.name] is start.choices[second.name]


def test_where_no_site_misses_a_limit_of_its_own_the_step_that_helps_most_for_its_cost_comes_first(two_sites):
    _, check, start = two_sites
    config = CompileConfig(fidelity=("output-error<=0",))  # which nothing keeps
    repaired = repair(check, start, config, lambda detail: None)
    assert list(check.results) == ["0 0", "0 1", "1 1"]
    assert repaired.repairs == 2


def test_all_repairs_take_one_pass_of_the_loops(two_sites, monkeypatch):
    teacher, check, start = two_sites
    asked = []

    def note(graph, sites, candidates, *others):
        asked.append({name: len(of_site) for name, of_site in candidates.items()})
        return candidate_fidelity(graph, sites, candidates, *others)

    monkeypatch.setattr("asapc.planning.check.candidate_fidelity", note)
    repaired = repair(check, start, CompileConfig(fidelity=("output-error<=0",)), lambda detail: None)
    assert repaired.repairs == 2
    assert asked == [dict.fromkeys(start.choices, 1), {n: len(c.front) - 1 for n, c in start.choices.items()}]
    assert check(repaired).sites == Check(teacher.studied, check.alternatives)(repaired).sites


def test_a_budget_on_the_whole_model_alone_lets_sites_go_as_far_as_it_does(teacher):
    name = teacher.site.name
    exact = replace(EXACT, half_steps=teacher.site.loop.half_steps)
    candidates = {name: [exact, *(candidate("truncated", t, 0.8 / t, half_steps=t) for t in (2, 3, 4, 6))]}
    # With two half-steps this site's relc is above 1, which no budget allows.
    for budget, expected in (("agreement>=0", 2), ("relc<=1", 3), ("output-error<=0", exact.half_steps)):
        config = CompileConfig(fidelity=(budget,))
        selection = decide(Check(teacher.studied, Alternatives(candidates)), config)
        assert selection.choices[name].candidate.half_steps == expected
    assert selection.repairs > 0


def test_a_budget_that_nothing_keeps_leaves_the_closest(teacher):
    start = Selection({teacher.site.name: Choice(EXACT, "", (EXACT,))})
    config = CompileConfig(fidelity=("relc<=1e-30",))
    start = Selection({teacher.site.name: replace(start.choices[teacher.site.name])})
    check = Check(teacher.studied, Alternatives({teacher.site.name: [EXACT]}))
    selection = repair(check, start, config, lambda detail: None)
    assert selection.choices[teacher.site.name].candidate is EXACT


def test_rivals_take_as_many_half_steps_as_they_are_said_to(teacher):
    name = teacher.site.name
    result = rivals(
        [teacher.site],
        Selection({name: Choice(candidate("sliced_dual", 1.0, 0.1), "")}, frozenset([name])),
        1,
        shipped(),
    )
    assert result["teacher"] == {}
    assert (result["exact"][name].half_steps, result["exact"][name].wide) == (teacher.site.loop.half_steps, True)
    assert result["truncated"][name].half_steps == 5
    assert result["softmax"][name].half_steps == 1


def test_a_plan_follows_the_costs(teacher):
    config = CompileConfig(slices=(8,), pieces=(0,), operators="sorted,truncated,exact", fidelity=("relc<=0.3",))

    def operator(**dear):
        model = replace(shipped(), milliseconds={**shipped().milliseconds, **dear})
        return choose(teacher.studied, config, model).choices[teacher.site.name].candidate

    sorts, half_steps = operator(sort=1.0), operator(half_step=100.0)
    assert (sorts.operator, half_steps.operator) == ("truncated", "sliced_dual")
    assert half_steps.half_steps < sorts.half_steps


def test_the_next_cheaper_selection_says_which_terms_it_misses_and_where(two_sites):
    teacher, check, start = two_sites
    first, second = teacher.sites
    repaired = repair(check, start, CompileConfig(fidelity=("relc<=0.2",)), lambda detail: None).cheaper
    assert (list(repaired.candidates), repaired.held_out, repaired.margin) == ([first.name], True, 1.0)
    assert repaired.cost == start.cost
    assert [str(term.bound) for term in repaired.missed] == ["relc<=0.2"]
    assert not repaired.missed[0].met
    # Nothing was repaired: the site alone misses its limit, less the margin.
    exact = Selection({name: replace(choice, candidate=choice.front[-1]) for name, choice in start.choices.items()})
    cheaper = repair(check, exact, CompileConfig(fidelity=("relc<=0.9",)), lambda detail: None).cheaper
    assert (list(cheaper.candidates), cheaper.held_out, cheaper.margin) == ([second.name], False, MARGIN)
    assert cheaper.cost == pytest.approx(exact.cost - 0.1)
    assert (str(cheaper.missed[0].bound), cheaper.missed[0].reached) == ("relc<=0.9", 0.9)


def test_of_a_budget_on_the_whole_model_the_row_before_the_chosen_one_is_the_next_cheaper(teacher):
    name = teacher.site.name
    exact = replace(EXACT, half_steps=teacher.site.loop.half_steps)
    candidates = {name: [exact, *(candidate("truncated", t, 0.8 / t, half_steps=t) for t in (2, 3, 4, 6))]}
    for budget, expected in (("agreement>=0", None), ("output-error<=1e-05", 6)):
        selection = decide(Check(teacher.studied, Alternatives(candidates)), CompileConfig(fidelity=(budget,)))
        steps = selection.cheaper and selection.cheaper.candidates[name].half_steps
        assert steps == expected
    assert [str(term.bound) for term in selection.cheaper.missed] == [budget]
