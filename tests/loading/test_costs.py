"""Files of costs: those that asapc carries are read, and all else is refused in one line."""

import json
import os
from pathlib import Path

import pytest
from helpers.paths import ROOT

from asapc.errors import OptionError
from asapc.loading.costs import SOFTMAX, read_costs
from asapc.loading.untrusted.texts import MAX_JSON_BYTES
from asapc.ops.sinkhorn import Sinkhorn
from asapc.planning.costs import shipped, shipped_file, work
from asapc.planning.trials import FEW_OPERATORS, FEW_SHAPES, operators
from asapc.types.costs import CostModel

CARRIED = (("cpu", "float32"), ("cuda", "float32"), ("cuda", "float16"))


def content() -> dict:
    return json.loads(shipped_file("cpu", "float32").read_text())


def costs(path: Path, **changes) -> Path:
    """A file of costs with other entries; None leaves one out."""
    changed = {name: value for name, value in (content() | changes).items() if value is not None}
    path.write_text(json.dumps(changed))
    return path


def milliseconds(**changes) -> dict:
    changed = content()["milliseconds"] | changes
    return {kind: cost for kind, cost in changed.items() if cost is not None}


@pytest.mark.parametrize(("provider", "precision"), CARRIED)
def test_the_costs_that_asapc_carries_keep_to_the_schema(provider, precision):
    path = shipped_file(provider, precision)
    model, carried = read_costs(path), shipped(provider, precision)
    assert model == CostModel(**{**vars(carried), "file": path})
    assert (model.provider, model.precision) == (provider, precision)
    assert 0 < model.median_error < 0.2


def test_the_schema_has_the_kinds_of_work_that_operators_take():
    schema = json.loads((ROOT / "docs" / "costs.schema.json").read_text())["properties"]["milliseconds"]
    few = operators(FEW_SHAPES[0].heads, FEW_SHAPES[0].head_dim)
    kinds = {kind for name in FEW_OPERATORS for kind, count in work(FEW_SHAPES[0], few[name]).items() if count}
    assert set(schema["required"]) == set(schema["properties"]) == kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "asapc.costs/2"}, "it is of version asapc.costs/2, and this asapc reads asapc.costs/1"),
        ({"schema": None}, "it is no file of costs"),
        ({"schema": 1}, "it is no file of costs"),
        ({"schema": "asapc.report/2"}, "it is no file of costs"),
        ({"milliseconds": milliseconds(sort=None)}, "it is about other operators: it lacks the costs of 'sort'"),
        ({"milliseconds": milliseconds(dance=1.0)}, "it is about other operators: it has costs of 'dance'"),
        ({"milliseconds": milliseconds(sort=-1.0)}, r"\$\.milliseconds\.sort"),
        ({"milliseconds": milliseconds(sort="1")}, r"\$\.milliseconds\.sort"),
        ({"milliseconds": [1.0]}, r"\$\.milliseconds"),
        ({"milliseconds": None}, "'milliseconds' is a required property"),
        ({"provider": "tpu"}, r"\$\.provider"),
        ({"precision": "int8"}, r"\$\.precision"),
        ({"device": None}, "'device' is a required property"),
        ({"median_error": -0.1}, r"\$\.median_error"),
        ({"colour": "red"}, "'colour'"),
    ],
)
def test_a_file_of_another_version_or_about_other_operators_or_with_wrong_values_is_refused(changes, message, tmp_path):
    path = costs(tmp_path / "costs.json", **changes)
    with pytest.raises(OptionError, match=message) as caught:
        read_costs(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    assert "asapc costs" in caught.value.hint


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e-3", "1e300", "9" * 5000])
def test_costs_that_are_not_finite_or_below_zero_are_refused(number, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(content()).replace('"loop": 0.0', f'"loop": {number}'))
    with pytest.raises(OptionError, match="cannot read"):
        read_costs(path)


@pytest.mark.parametrize("kinds", SOFTMAX, ids=["materialised", "fused"])
def test_what_ratios_are_taken_to_cannot_be_free(kinds, tmp_path):
    with pytest.raises(OptionError, match="softmax takes no time"):
        read_costs(costs(tmp_path / "costs.json", milliseconds=milliseconds(**dict.fromkeys(kinds, 0.0))))


def test_a_fit_may_leave_a_part_of_softmax_at_nothing(tmp_path):
    path = costs(tmp_path / "costs.json", milliseconds=milliseconds(softmax=0.0, fused_softmax=0.0))
    assert read_costs(path).milliseconds["softmax"] == 0


def test_softmax_consists_of_that_work():
    softmax = Sinkhorn(1)
    for lowering, kinds in zip(("materialised", "fused"), SOFTMAX, strict=True):
        softmax.lowering = lowering
        units = work(FEW_SHAPES[0], softmax)
        assert {kind for kind, count in units.items() if count} - {"loop"} == kinds


def test_the_name_of_a_device_moves_no_cursor(tmp_path):
    assert read_costs(costs(tmp_path / "costs.json", device="\x1b[31mred\n")).device == " [31mred "


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"schema": ', "[" * 5000, '{"a": 1, "a": 2}'])
def test_a_damaged_file_is_refused(text, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(OptionError, match="cannot read") as caught:
        read_costs(path)
    assert caught.value.hint


def test_what_is_no_file_or_too_long_is_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "missing"):
        with pytest.raises(OptionError, match="cannot read"):
            read_costs(path)
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(OptionError, match="bytes"):
        read_costs(tmp_path / "long.json")
