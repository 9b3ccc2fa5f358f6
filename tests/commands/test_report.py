"""`asapc report`: what a folder says again, as it was printed, as a page and as Markdown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.command import QUICK, assert_user_error, run, write_checkpoint
from helpers.folders import relist, tamper
from helpers.quick import quick_compilation

from asapc.commands.report import read_report, render_report

HEADS = ("Sinkhorn attention", "What else there was", "Latency in ONNX Runtime")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = write_checkpoint(folder / "model.pt")
    with quick_compilation():
        result = run("compile", path, "--out", folder / "out", "--fidelity", "relc<=1", "--target", "onnx", *QUICK)
    assert result.exit_code == 0, result.stderr
    (folder / "printed.txt").write_text(result.stdout)
    return folder


def test_the_page_of_the_folder_is_drawn_again_byte_for_byte(compiled, tmp_path):
    page = tmp_path / "page.html"
    result = run("report", compiled / "out", "--html", page)
    assert (result.exit_code, result.stdout.strip()) == (0, str(page))
    assert page.read_bytes() == (compiled / "out" / "report.html").read_bytes()
    assert "blocks.0.attention" in page.read_text()
    assert_user_error(run("report", compiled / "out", "--html", page))
    assert run("report", compiled / "out", "--html", page, "--force").exit_code == 0


def test_it_prints_what_compile_printed(compiled):
    result = run("report", compiled / "out")
    assert result.stdout == (compiled / "printed.txt").read_text()
    data = json.loads(run("report", compiled / "out", "--json").stdout)
    assert data == json.loads((compiled / "out" / "report.json").read_text())


def test_markdown_has_the_tables_and_the_verdict(compiled, tmp_path):
    summary = tmp_path / "summary.md"
    assert run("report", compiled / "out", "--markdown", summary).exit_code == 0
    text = summary.read_text()
    assert text.startswith("PASSED")
    assert all(f"**{head}" in text for head in HEADS)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == len(HEADS)
    for head, rule, *rows in tables:
        assert {row.count(" |") for row in (head, rule, *rows)} == {head.count(" |")}
        assert set(rule) <= set("|-: ")


def test_the_report_says_what_was_asked_for_and_what_the_files_are(compiled):
    data = read_report(compiled / "out").data
    assert data["command"].startswith(f"asapc compile {compiled}/model.pt --out {compiled}/out")
    assert data["options"]["fidelity"] == ["relc<=1"]
    assert [value["name"] for value in data["inputs"]] == ["images"]
    assert data["inputs"][0]["shape"][1:] == [4, 4]
    assert (data["inputs"][0]["dtype"], len(data["outputs"])) == ("float32", 1)
    stages = [stage["stage"] for stage in data["stages"]]
    assert stages[:3] == ["load", "capture", "find"]
    assert stages[-1] == "figures"


@pytest.mark.parametrize("command", [("report",), ("verify", "--data", "data.npz")], ids=lambda words: words[0])
@pytest.mark.parametrize("version", ["asapc.report/1", "asapc.report/2", "asapc.report/99"])
def test_a_folder_of_another_version_is_refused_in_one_true_line(command, version, compiled, tmp_path):
    folder = tamper(compiled / "out", tmp_path / "old", "report.json", lambda report: {"schema": version})
    error, hint = assert_user_error(run(command[0], folder, *command[1:]))
    why = f"report.json is {version}, this one reads asapc.report/3"
    assert error == f"error: {folder} was written by another version of asapc: {why}"
    assert "compile the model again" in hint


def other_figures(compiled: Path, target: Path, **changes: object) -> Path:
    """A folder whose figures are others, and whose manifest says so."""
    shutil.copytree(compiled / "out", target)
    with np.load(target / "figures.npz") as arrays:
        content = dict(arrays) | {name.replace("_", "."): value for name, value in changes.items()}
    np.savez_compressed(target / "figures.npz", **{name: value for name, value in content.items() if value is not None})
    relist(target)
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"0_teacher": np.zeros((2, 9000, 9))},
        {"0_teacher": np.zeros((0, 16, 16))},
        {"0_columns": np.array(["x"])},
        {"7_dual": np.zeros((2, 3))},
        {"secret": np.zeros(3)},
        {"0_dual": np.zeros((3, 3))},
        {"0_compiled": np.zeros((1, 2, 3))},
        {"0_head": np.array([1])},
    ],
    ids=str,
)
def test_arrays_that_are_no_figures_are_refused(changes, compiled, tmp_path):
    folder = other_figures(compiled, tmp_path / "odd", **changes)
    error, _ = assert_user_error(run("report", folder, "--html", tmp_path / "page.html"))
    assert str(folder) in error
    assert not (tmp_path / "page.html").exists()


def test_a_folder_whose_figures_are_gone_has_a_page_without_them(compiled, tmp_path):
    shutil.copytree(compiled / "out", tmp_path / "bare")
    (tmp_path / "bare" / "figures.npz").unlink()
    relist(tmp_path / "bare")
    assert "blocks.0.attention" in render_report(read_report(tmp_path / "bare"))


def test_numbers_that_no_compilation_gives_are_drawn_or_refused_in_one_line(compiled, tmp_path):
    def change(report: dict) -> None:
        report["sites"][0]["choice"]["front"] = [
            candidate | {"estimated_ms": 1e308, "calibration_relc": 1e-320}
            for candidate in report["sites"][0]["choice"]["front"]
        ]
        for run_ in report["latency"]["runs"]:
            run_["p50_ms"] = 0.0

    folder = tamper(compiled / "out", tmp_path / "odd", "report.json", change)
    result = run("report", folder, "--html", tmp_path / "page.html")
    assert result.exit_code == 0 or str(folder) in assert_user_error(result)[0]


def test_a_report_without_the_compiled_models_latency_is_refused(compiled, tmp_path):
    def lacks(report: dict) -> None:
        report["latency"]["runs"] = [run for run in report["latency"]["runs"] if run["name"] != "compiled"]

    folder = tamper(compiled / "out", tmp_path / "lacks", "report.json", lacks)
    assert "lacks the latency" in assert_user_error(run("report", folder))[0]
