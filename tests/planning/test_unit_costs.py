"""The fit of costs: on costs that are known, and on those that asapc carries."""

import json
from itertools import product

import numpy as np
import pytest
from helpers.paths import ROOT

from asapc.planning.costs import Shape, shipped
from asapc.planning.unit_costs import Binding, Trial, fit_costs, median_error

RESULTS = ROOT / "benchmarks" / "results"
COSTS = {"call": 0.1, "entry": 3e-6, "sort": 2e-5}


def trials(**changes):
    """Operators that take what their work costs."""
    costs = COSTS | changes
    sizes = product((10.0, 1e4, 1e6), (0.0, 1e3, 1e5))
    works = [{"call": 1, "entry": entries, "sort": sorts} for entries, sorts in sizes]
    return [Trial(work, sum(count * costs[kind] for kind, count in work.items())) for work in works]


def test_costs_that_are_known_are_found():
    costs, estimates = fit_costs(trials())
    assert costs == pytest.approx(COSTS)
    assert median_error(trials(), estimates) < 1e-9


def test_a_cost_that_would_be_negative_is_zero():
    saving = [Trial(trial.work, trial.milliseconds - 1e-7 * trial.work["entry"]) for trial in trials(entry=0.0)]
    costs, _ = fit_costs([trial for trial in saving if trial.milliseconds > 0])
    assert costs["entry"] == 0


def test_a_kind_that_is_bound_keeps_its_ratio_to_another_also_through_a_third():
    bindings = {"entry": Binding("sort", 0.5, "why"), "pass": Binding("entry", 4.0, "why")}
    costs, estimates = fit_costs(trials(entry=1e-5), bindings)
    assert costs == pytest.approx({"call": 0.1, "sort": 2e-5, "entry": 1e-5, "pass": 4e-5})
    assert median_error(trials(entry=1e-5), estimates) < 1e-9


def test_the_costs_of_a_cpu_are_those_of_what_was_measured():
    rows = json.loads((RESULTS / "costs.json").read_text())["rows"]
    measured = [Trial(row["work"], row["p50_ms"]) for row in rows]
    costs, estimates = fit_costs(measured)
    assert {kind: cost for kind, cost in shipped().milliseconds.items() if kind in costs} == pytest.approx(costs)
    assert median_error(measured, estimates) == pytest.approx(shipped().median_error, abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_costs_of_a_gpu_are_those_of_what_was_measured(precision):
    model, results = shipped("cuda", precision), json.loads((RESULTS / "gpu_costs.json").read_text())[precision]
    gpu = json.loads((RESULTS / "gpu.json").read_text())["layers"]
    times = {
        (layer["length"], name): ms for layer in gpu if layer["dtype"] == precision for name, ms in layer["ms"].items()
    }
    assert dict(model.milliseconds) == results["milliseconds"]
    errors = []
    for row in results["rows"]:
        estimate = sum(count * model.milliseconds[kind] for kind, count in row["work"].items())
        assert estimate == pytest.approx(row["estimate_ms"])
        assert row["p50_ms"] == times[Shape(**row["shape"]).queries, row["operator"]]
        errors.append(abs(estimate / row["p50_ms"] - 1))
    assert np.median(errors) == pytest.approx(model.median_error, rel=1e-3)
