"""When the gate closes, and what is said then."""

from math import nan

import pytest

from asapc.errors import FidelityError, OptionError
from asapc.fidelity.budget import check_budget
from asapc.types.budget import Bound
from asapc.types.results import Fidelity, Hop, Metric, SiteFidelity


def fidelity(**changes) -> Fidelity:
    values = {
        "samples": 4,
        "logits_rel": 0.01,
        "agreement": 0.99,
        "metric": Metric("accuracy", 0.96, 0.955),
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
    ],
)
def test_a_budget_is_met_or_missed(met, missed):
    check_budget(fidelity(), [met])
    with pytest.raises(FidelityError, match=str(missed)) as caught:
        check_budget(fidelity(), [met, missed])
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_without_a_budget_the_default_holds():
    check_budget(fidelity(), ())
    for worse in (
        fidelity(agreement=0.97),
        fidelity(sites={"a": SiteFidelity(0.3, 0.0, 0.0, 0.0)}),
    ):
        with pytest.raises(FidelityError):
            check_budget(worse, ())


def test_the_default_budget_asks_nothing_that_cannot_be_judged():
    check_budget(fidelity(agreement=None, metric=None), ())


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
    # The error of an operator is seen on the graph's own activations: no other step has a part in it.
    with pytest.raises(FidelityError) as caught:
        check_budget(of(0.3, 0.1, 0.0), [Bound("relc", 0.04)])
    assert "capture" not in str(caught.value)
    assert "-O1" in caught.value.hint


def test_a_missed_budget_speaks_of_the_compiled_model_and_of_its_cost_where_that_is_known():
    # `asapc verify` knows no cost, and has selected nothing.
    for cost, end in ((None, "outside the budget relc<=0.04"), (0.25, "25% of the exact forms' time, as estimated")):
        with pytest.raises(FidelityError, match=r"^the compiled model has relc 0\.05 on 4 samples, ") as caught:
            check_budget(fidelity(), [Bound("relc", 0.04)], cost)
        assert str(caught.value).endswith(end)
