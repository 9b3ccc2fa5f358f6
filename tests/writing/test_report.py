import json
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers.fitted import changed
from helpers.paths import ROOT
from helpers.reports import CONDITIONS, matching, report, site

from asapc.types.graph import EarlyStops
from asapc.types.site import Miss
from asapc.types.timing import BatchLatency, Latency, Ratio
from asapc.writing.report import early_stop_data, early_stop_note, miss_data, site_data, speed_note

SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())


def test_a_report_keeps_to_its_schema_as_json() -> None:
    jsonschema.validate(json.loads(json.dumps(report(), allow_nan=False)), SCHEMA)


def test_what_inspect_prints_is_described_as_it_is_in_the_report() -> None:
    inspect = json.loads((ROOT / "docs" / "inspect.schema.json").read_text())
    of_report, of_inspect = (schema["$defs"]["site"] for schema in (SCHEMA, inspect))
    added = {"choice", "fidelity", "calibration_range", "wide"}
    assert set(of_inspect["required"]) == set(of_report["required"]) - added == set(site_data(matching("a")))
    assert of_inspect["properties"].items() <= of_report["properties"].items()
    for name in ("misses", "early_stops"):
        assert inspect["properties"][name] == SCHEMA["properties"][name]
    assert inspect["$defs"]["source"] == SCHEMA["$defs"]["source"]


@pytest.mark.parametrize("source", ["model.py:3", "model.onnx: node_einsum_22", "model.onnx: /blocks.0/MatMul", None])
def test_a_source_is_a_line_of_code_or_a_node_of_a_file(source) -> None:
    data = report()
    data["sites"][0]["source"] = source
    jsonschema.validate(data, SCHEMA)
    data["sites"][0]["source"] = "model.py"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_the_schema_refuses_what_it_does_not_describe() -> None:
    data = report()
    data["sites"][0]["choice"]["operator"] = "guess"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)
    for change in ({"ends_in": "nothing"}, {"share": 1.5}, {"epsilon": "?"}):
        data = report()
        data["sites"][0] |= change
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data, SCHEMA)
    data = report()
    del data["misses"][0]["hint"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report(), "more": 1}, SCHEMA)


@pytest.mark.parametrize(
    ("ratio", "note"),
    [
        (Ratio(1.5, 1.4, 1.6), "1.50x as fast as exact Sinkhorn (1.40 to 1.60) at batch 8"),
        (Ratio(1.015, 1.012, 1.018), "(1.01 to 1.02) at batch 8: the approximation does not pay, use -O1 here"),
        (Ratio(0.5, 0.4, 0.6), "0.50x as fast as exact Sinkhorn (0.40 to 0.60) at batch 8: the approximation does not"),
        (Ratio(1.2, 0.9, 1.5), "which this run cannot tell from 1: the same file opened twice may differ by 2%"),
        (Ratio(1.0, 1.0, 1.0, identical=True), "this is exact Sinkhorn"),
    ],
)
def test_the_headline_says_what_the_approximation_gains_and_what_to_do_where_that_is_nothing(ratio, note) -> None:
    batches = (BatchLatency(8, (), {"exact": ratio}, floor=0.02, blocks=5, stable=True, warnings=()),)
    latency = Latency("cpu", 1, batches, CONDITIONS)
    assert note in speed_note(latency)
    assert "approximation" not in speed_note(latency, as_written=True)


def test_what_speaks_against_the_figures_stands_in_the_report() -> None:
    latency = report()["latency"]
    assert latency["warnings"] == ["batch 1: why", "batch 32: why"]
    assert [each["stable"] for each in latency["measurements"]] == [True, False]
    assert report()["verdict"]["headline"].endswith("at batch 32")
    assert report()["verdict"]["terms"][0]["closest"] == "relc<=0.1"


def test_ratios_are_at_the_largest_batch() -> None:
    latency = report()["latency"]
    assert latency["batch"] == 32
    assert latency["speedup_vs_teacher"] == 4.0
    assert latency["speedup_vs_exact"] == 1.5
    assert latency["speedup_vs_truncated"] == 0.75
    assert latency["ratio_to_softmax"] == 2.0


def test_epsilon_is_a_number_or_a_list_where_it_differs_by_head() -> None:
    assert site_data(site("a", [1.0, 1.0]))["epsilon"] == pytest.approx(0.25)
    assert site_data(site("b", [1.0, 2.0]))["epsilon"] == pytest.approx([0.25, 0.125])
    assert site_data(matching("c"))["epsilon"] is None


def test_a_temperature_that_queries_and_keys_carry_already_counts_in_epsilon() -> None:
    folded = changed(site("a", [1.0, 1.0]), folded=torch.tensor([0.5, 0.5]))
    assert site_data(folded)["epsilon"] == pytest.approx(0.5)


def test_a_site_says_what_it_ends_in_and_its_share() -> None:
    attention, _, plan = report()["sites"]
    assert (attention["ends_in"], attention["share"], attention["head_dim"]) == ("attention", 0.1235, 16)
    assert (plan["ends_in"], plan["head_dim"], plan["fidelity"]) == ("plan", None, None)
    # A plan that is multiplied with values and read elsewhere too is attention.
    assert site_data(changed(site("a", [1.0]), attention=None))["ends_in"] == "attention"


def test_a_miss_carries_its_hint() -> None:
    assert report()["misses"] == [{"node": "node", "source": None, "reason": "why", "hint": "what to do"}]
    here = str(Path.cwd() / "model.py:3")
    assert miss_data(Miss("node", here, "why", "hint"))["source"] == "model.py:3"


def test_a_sliced_dual_names_its_features_and_a_kept_site_none() -> None:
    first, second, _ = (entry["choice"] for entry in report()["sites"])
    assert first["features"] == ["parabola", "mean", "slices"]
    assert second["features"] == []


def test_early_stops_stand_in_the_report_and_are_none_where_a_model_has_none() -> None:
    assert report()["early_stops"] == {
        "stops": [{"source": "sinkhorn.py:7", "question": "if err.item() < self.tol:"}],
        "difference": 1e-3,
        "taken": True,
    }
    assert early_stop_data(None) is None
    jsonschema.validate({**report(), "early_stops": None}, SCHEMA)


def test_the_note_names_the_line_and_what_leaving_the_stop_out_changes() -> None:
    assert early_stop_note(None) == ""
    stops = EarlyStops({"a.py:7": "if a:", "b.py:8": "if b:"}, 1.234e-3, taken=True)
    note = early_stop_note(early_stop_data(stops))
    assert "a.py:7, b.py:8" in note
    assert "1.2e-03" in note
    same = EarlyStops(stops.questions, 1e-8, taken=False)
    assert "changes nothing" in early_stop_note(early_stop_data(same))
