"""When the gate closes, and what is said then."""

from math import inf, nan

import pytest

from asapc.errors import FidelityError, OptionError
from asapc.fidelity.budget import check_budget
from asapc.types.budget import Bound, Term, parse_bound
from asapc.types.results import Fidelity, Hop, Metric, SiteFidelity


def fidelity(**changes) -> Fidelity:
    values = {
        "samples": 4,
        "logits_rel": 0.01,
        "agreement": 0.99,
        "metric": Metric("accuracy", 0.96, 0.955),
        "outputs": {"logits": 0.01, "features": 0.03},
        "hops": (),
        "variants": {},
        "sites": {"a": SiteFidelity(0.03, 0.0, 0.0, 0.01), "b": SiteFidelity(0.05, 0.0, 0.0, 0.02)},
    }
    return Fidelity(**{**values, **changes})


@pytest.mark.parametrize(
    ("met", "missed"),
    [
        (Bound("agreement", 0.99), Bound("agreement", 0.995)),
        (Bound("metric-drop", 0.51), Bound("metric-drop", 0.49)),  # percentage points: 96 - 95.5
        (Bound("relc", 0.05), Bound("relc", 0.04)),  # the worst site counts
        (Bound("column-marginal", 0.02), Bound("column-marginal", 0.015)),
        (Bound("output-error", 0.03), Bound("output-error", 0.029)),  # the worst output counts
    ],
)
def test_a_budget_is_met_or_missed(met, missed):
    check_budget(fidelity(), [met])
    with pytest.raises(FidelityError, match=str(missed)) as caught:
        check_budget(fidelity(), [met, missed])
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_a_model_that_is_better_than_its_teacher_drops_nothing():
    check_budget(fidelity(metric=Metric("accuracy", 0.9, 0.95)), [Bound("metric-drop", 0.0)])


@pytest.mark.parametrize(
    "broken", [{"logits_rel": nan}, {"hops": (Hop("export", inf, inf, None),)}], ids=["output", "hop"]
)
def test_outputs_that_are_not_finite_keep_no_budget(broken):
    with pytest.raises(FidelityError, match="NaN or infinity"):
        check_budget(fidelity(**broken), [Bound("relc", 1.0)])


def test_without_a_budget_the_default_holds():
    check_budget(fidelity(), ())
    for worse in (
        fidelity(agreement=0.97),
        fidelity(sites={"a": SiteFidelity(0.3, 0.0, 0.0, 0.0)}),
    ):
        with pytest.raises(FidelityError):
            check_budget(worse, ())


def test_without_classes_the_default_is_about_the_error_of_outputs():
    verdict = check_budget(fidelity(agreement=None, metric=None), ())
    assert [term.bound.metric for term in verdict.terms] == ["output-error", "relc"]
    with pytest.raises(FidelityError, match="output-error"):
        check_budget(fidelity(agreement=None, outputs={"a": 0.01, "b": 0.06}), ())


def test_the_verdict_says_first_what_is_missed_and_what_was_reached():
    verdict = check_budget(fidelity(), ())
    assert verdict.headline == "PASSED: agreement 0.99 (agreement>=0.98), relc 0.05 (relc<=0.08)"
    with pytest.raises(FidelityError) as caught:
        check_budget(fidelity(), [Bound("agreement", 0.9), Bound("relc", 0.04)])
    assert str(caught.value).startswith("FAILED: relc 0.05 (relc<=0.04 missed), agreement 0.99 (agreement>=0.9)")


def test_what_capture_changes_counts_at_the_sites_too():
    off = fidelity(hops=(Hop("capture", 0.1, 0.1, 1.0),))
    for bound in (Bound("relc", 0.1), Bound("column-marginal", 0.1)):
        check_budget(fidelity(), [bound])
        with pytest.raises(FidelityError):
            check_budget(off, [bound])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("agreement>=99", "agreement>=0.99"),
        ("agreement>=99%", "agreement>=0.99"),
        ("agreement>=0.5%", "agreement>=0.005"),
        ("relc<=8", "relc<=0.08"),
        ("output-error<=5", "output-error<=0.05"),
        ("relc<=-1", "--fidelity"),
        ("agreement>=1e9", "--fidelity"),
        ("metric-drop<=101", "metric-drop<=0.5"),
        ("metric-drop<=1%", "metric-drop<=0.5"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_with_what_was_meant(text, meant):
    with pytest.raises(OptionError, match="cannot be") as caught:
        parse_bound(text)
    assert meant in caught.value.hint


@pytest.mark.parametrize("changes", [{"metric": None}, {"agreement": None}], ids=["no labels", "no classes"])
def test_a_budget_that_cannot_be_judged_is_refused_and_says_why(changes):
    bound = Bound("metric-drop", 100.0) if "metric" in changes else Bound("agreement", 0.0)
    # The user's option is at fault, not the compiled model: no FidelityError.
    with pytest.raises(OptionError, match="labels") as caught:
        check_budget(fidelity(**changes), [bound])
    assert str(bound) in str(caught.value)
    assert "--calib" in caught.value.hint


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_site_whose_error_is_nan_misses_every_budget_on_it(order):
    by_name = {"a": SiteFidelity(0.01, 0.0, 0.0, 0.01), "b": SiteFidelity(nan, nan, nan, nan)}
    broken = fidelity(sites={name: by_name[name] for name in order})
    for bound in (Bound("relc", 0.5), Bound("column-marginal", 0.5)):
        with pytest.raises(FidelityError):
            check_budget(broken, [bound])
    with pytest.raises(FidelityError):
        check_budget(broken, ())


def test_a_missed_budget_names_the_step_that_costs_most_and_what_to_do_about_it():
    def of(capture, amortisation, export):
        rels = {"capture": capture, "amortisation": amortisation, "export": export}
        return fidelity(agreement=0.9, hops=tuple(Hop(name, rel, rel, None) for name, rel in rels.items()))

    for hops, name, hint in [
        ((0.3, 0.1, 0.0), "capture", "--early-stop refuse"),
        ((0.0, 0.1, 0.0), "amortisation", "-O1"),
        ((0.0, 0.1, 0.2), "export", "report"),
    ]:
        with pytest.raises(
            FidelityError, match=rf"agreement.*{name} changes the outputs most, by {max(hops):.1e}"
        ) as caught:
            check_budget(of(*hops), ())
        assert hint in caught.value.hint
    # The error of an operator is seen on the graph's own activations: but for capture no step has a part in it.
    with pytest.raises(FidelityError) as caught:
        check_budget(of(0.0, 0.1, 0.3), [Bound("relc", 0.04)])
    assert "export" not in str(caught.value)
    assert "-O1" in caught.value.hint


def test_a_missed_budget_speaks_of_the_compiled_model_and_of_its_cost_where_that_is_known():
    # `asapc verify` knows no cost, and has selected nothing.
    for cost, end in (
        (None, "on 4 samples; relc<=0.05 would have passed"),
        (0.25, "25% of the exact forms' time, as estimated"),
    ):
        with pytest.raises(FidelityError, match=r"^FAILED: relc 0\.05 \(relc<=0\.04 missed\), on 4 samples") as caught:
            check_budget(fidelity(), [Bound("relc", 0.04)], cost)
        assert str(caught.value).endswith(end)


@pytest.mark.parametrize(
    ("metric", "reached", "closest"),
    [
        ("agreement", 0.98765, "agreement>=0.987"),
        ("agreement", 1.0, "agreement>=1"),
        ("relc", 0.053219, "relc<=0.0533"),
        ("relc", 0.05, "relc<=0.05"),
        ("relc", 3.776e-07, "relc<=3.78e-07"),
        ("metric-drop", -0.4567, "metric-drop<=-0.456"),
        ("output-error", 0.0, "output-error<=0"),
    ],
)
def test_the_closest_term_is_one_that_is_kept_and_can_be_given(metric, reached, closest):
    term = Term(Bound(metric, 0.5), reached)
    assert str(term.tightest) == closest
    assert parse_bound(closest).met(reached)
