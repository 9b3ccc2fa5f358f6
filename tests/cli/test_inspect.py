"""`asapc inspect`: what it lists, in words and as JSON."""

import json
from pathlib import Path

import jsonschema
from helpers.command import assert_user_error, run, write_checkpoint
from helpers.paths import ROOT

import asapc.commands.inspect
from asapc.loading.model import load_model
from asapc.types.graph import EarlyStops
from asapc.types.site import Findings, Miss

INSPECT_SCHEMA = json.loads((ROOT / "docs" / "inspect.schema.json").read_text())


def test_inspect_prints_a_row_for_each_site(shipped):
    result = run("inspect", shipped)
    assert result.exit_code == 0, result.stderr
    sites = len(load_model(shipped).module.blocks)
    rows = [line.split() for line in result.stdout.splitlines() if "attention" in line and "64 x 64" in line]
    assert len(rows) == sites
    for row in rows:
        assert {"40", "rows", "0.25"} <= set(row)
    assert "kernel.py:" in result.stdout  # where the code stands
    assert ", 64 samples" in result.stderr  # which it counts once


def test_inspect_json_is_json_alone(shipped):
    result = run("inspect", shipped, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    jsonschema.validate(data, INSPECT_SCHEMA)
    assert data["schema"] == "asapc.inspect/1"
    assert data["sites"]
    for site in data["sites"]:
        assert (site["half_steps"], site["last"], site["epsilon"], site["queries"]) == (40, "rows", 0.25, 64)
    assert data["misses"] == []


def test_what_a_model_prints_is_no_part_of_the_json(shipped, monkeypatch):
    def prints(*args):
        print("seen")  # noqa: T201
        return Findings((), ())

    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", prints)
    result = run("inspect", shipped, "--json")
    assert json.loads(result.stdout)["sites"] == []
    assert "seen" in result.stderr


def test_inspect_why_says_what_was_turned_down(tmp_path):
    softmax = write_checkpoint(tmp_path / "softmax.pt", iterations=0)
    result = run("inspect", softmax, "--why")
    _, hint = assert_user_error(result)
    assert hint == "hint: there is nothing to change"  # and not to run what was run
    miss = next(line for line in result.stdout.splitlines() if line.startswith("miss: "))
    assert "kernel.py:" in miss
    assert "softmax" in miss
    assert "miss: " not in run("inspect", softmax).stdout


def test_inspect_says_of_a_site_and_a_miss_what_the_finder_says(shipped, monkeypatch):
    miss = Miss("matmul_1", None, "the reason [in brackets]", "a hint")  # which rich must not take for markup
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), (miss,)))
    result = run("inspect", shipped, "--why")
    assert "miss: no source line (node matmul_1): the reason [in brackets]; a hint" in result.stdout
    data = json.loads(run("inspect", shipped, "--json").stdout)
    jsonschema.validate(data, INSPECT_SCHEMA)
    assert data["misses"] == [
        {"node": "matmul_1", "source": None, "reason": "the reason [in brackets]", "hint": "a hint"}
    ]


def test_an_error_names_lines_as_the_table_does_and_no_misses_where_there_are_none(shipped, monkeypatch):
    miss = Miss("matmul_1", str(Path.cwd() / "model.py:3"), "the reason", "a hint")
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), (miss,)))
    assert "; model.py:3: the reason" in assert_user_error(run("inspect", shipped))[0]
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), ()))
    assert "--why" not in assert_user_error(run("inspect", shipped))[1]


def test_inspect_prints_which_early_stops_are_left_out_and_what_that_changes(shipped, monkeypatch):
    stops = EarlyStops({"sinkhorn.py:7": "if err < tol:"}, 2e-3, taken=True)
    monkeypatch.setattr(asapc.commands.inspect, "inspect_model", lambda *args: Findings((), (), stops))
    result = run("inspect", shipped)
    assert "early stop at sinkhorn.py:7" in result.stdout
    assert "2.0e-03" in result.stdout
    data = json.loads(run("inspect", shipped, "--json").stdout)
    jsonschema.validate(data, INSPECT_SCHEMA)
    assert data["early_stops"]["stops"] == [{"source": "sinkhorn.py:7", "question": "if err < tol:"}]
    assert data["early_stops"]["difference"] == 2e-3
