"""`asapc tradeoffs`: the front of a model as a table, as JSON and as a picture."""

import json
from pathlib import Path

import jsonschema
import pytest
from helpers.command import assert_user_error, run
from helpers.paths import ROOT

import asapc
from asapc.commands.tradeoffs import Tradeoffs

TRADEOFFS, REPORT = (
    json.loads((ROOT / "docs" / f"{name}.schema.json").read_text()) for name in ("tradeoffs", "report")
)
QUICK = ("--pieces", "0", "--threads", "1")


@pytest.fixture(scope="module")
def result(small):
    return run("tradeoffs", small, *QUICK, "--json")


def test_json_keeps_to_its_schema(result):
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    jsonschema.validate(data, TRADEOFFS)
    assert data["rows"][-1]["times_exact"] == pytest.approx(1)
    assert [row["chosen"] for row in data["rows"]].count(True) == 1


def test_candidates_are_described_as_in_the_report():
    assert TRADEOFFS["$defs"]["candidate"] == REPORT["$defs"]["candidate"]


def test_the_table_has_a_row_for_each_and_fits_80_columns(result, small):
    rows = json.loads(result.stdout)["rows"]
    shown = run("tradeoffs", small, *QUICK).stdout
    table = shown.partition("Times by")[0]
    assert max(map(len, table.splitlines())) <= 80
    for row in rows:
        assert f"{row['estimated_ms']:.2f}" in shown
        assert (row["fidelity"] or "") in shown
    assert table.count("* ") == 1


def test_python_gives_the_same(result, small):
    config = asapc.CompileConfig(pieces=(0,), threads=1)
    assert asapc.tradeoffs(small, config).data == json.loads(result.stdout)


def test_a_second_budget_takes_what_the_first_has_fitted(result, small, monkeypatch):
    monkeypatch.setattr("asapc.planning.alternatives.propose", None)
    assert result.stdout == run("tradeoffs", small, *QUICK, "--json").stdout
    monkeypatch.undo()
    assert result.stdout == run("tradeoffs", small, *QUICK, "--json", "--no-cache").stdout


def test_the_picture_is_drawn_and_not_overwritten(small):
    shown = run("tradeoffs", small, *QUICK, "--plot", "front.png")
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[-1] == "front.png"
    content = Path("front.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    message, _ = assert_user_error(run("tradeoffs", small, *QUICK, "--plot", "front.png"))
    assert "exists already" in message
    assert Path("front.png").read_bytes() == content
    message, hint = assert_user_error(run("tradeoffs", small, *QUICK, "--plot", "front.doc"))
    assert "front.doc" in message
    assert ".png" in hint
    assert [path.name for path in Path.cwd().iterdir()] == ["front.png"]


def test_times_follow_the_target(result, small):
    on_gpu = json.loads(run("tradeoffs", small, *QUICK, "--json", "--target", "cuda").stdout)
    on_cpu = json.loads(result.stdout)
    assert (on_cpu["costs"]["model"], on_gpu["costs"]["model"]) == ("cpu", "cuda, float32")
    assert on_gpu["exact_ms"] != on_cpu["exact_ms"]


def test_a_cache_that_cannot_be_written_is_a_line_and_no_error(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = run("tradeoffs", small, *QUICK, "--json")
    assert result.exit_code == 0
    assert "nothing was kept for another run" in result.stderr


def test_exact_rewrites_have_nothing_to_trade(small):
    with pytest.raises(asapc.AsapcError, match="-O1"):
        asapc.tradeoffs(small, asapc.CompileConfig(level=1))


def test_a_picture_without_a_row_that_has_an_estimate_is_empty_and_no_crash(result, tmp_path):
    data = json.loads(result.stdout)
    kept = data["rows"][-1] | {"estimated_ms": None, "times_softmax": None, "times_exact": None}
    Tradeoffs(data | {"rows": [kept]}).draw(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
