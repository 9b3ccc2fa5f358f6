"""`asapc compile`: what it prints, where, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from helpers.command import QUICK, assert_user_error, folder, run, written
from helpers.documents import quick_words
from helpers.paths import ROOT

import asapc
import asapc.backends.tensorrt.builder
import asapc.commands.compile
from asapc.config import CompileConfig
from asapc.errors import FidelityError

pytestmark = pytest.mark.usefixtures("quick")


def test_a_missed_budget_exits_with_3_and_leaves_no_folder(small):
    error, _ = assert_user_error(run("compile", small, "--fidelity", "output-error<=0", *QUICK), code=3)
    assert "output-error<=0" in error
    assert list(Path.cwd().iterdir()) == []


def test_a_missed_budget_leaves_an_earlier_output_as_it_was(small, monkeypatch):
    out = folder(Path("out"))
    written(out / "manifest.json", b'{"schema": "asapc.manifest/1", "files": {}}')

    def refuse(*args, **options):
        raise FidelityError("missed", "try again")

    monkeypatch.setattr(asapc.commands.compile, "study", refuse)  # long before the real gate, to save time
    assert_user_error(run("compile", small, "--out", out, "--force", *QUICK), code=3)
    assert [str(path) for path in Path().rglob("*")] == ["out", "out/manifest.json"]


def test_a_defect_exits_with_70_a_traceback_and_a_request_to_report_it(small, monkeypatch):
    def broken(*args):
        raise RuntimeError("the wheel came off [axle]")

    monkeypatch.setattr(asapc.commands.compile, "compile_model", broken)
    result = run("compile", small)
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "RuntimeError: the wheel came off [axle]" in result.stderr
    assert "report" in result.stderr
    assert not any(line.startswith("hint: ") for line in result.stderr.splitlines())
    assert result.stdout == ""


def test_options_reach_the_library_and_those_on_the_command_line_win(small, monkeypatch):
    actual = []
    monkeypatch.setattr(asapc.commands.compile, "compile_model", lambda *args: actual.extend(args[:2]) or 1 / 0)
    toml = written(Path("o.toml"), b'seed = 1\nthreads = 3\nslices = [4]\nout = "there"\n')
    run("compile", small, "--config", toml, "--seed", 2, "--batch", 1, "--batch", 8, "--fidelity", "relc<=0.1")
    assert actual == [
        small,
        CompileConfig(out=Path("there"), seed=2, threads=3, slices=(4,), batches=(1, 8), fidelity=("relc<=0.1",)),
    ]


@pytest.fixture(scope="module")
def compiled(small, tmp_path_factory):
    """The small model, compiled once in a process of its own."""
    place = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, *quick_words(), "compile", small, *QUICK, "--fidelity", "relc<=1"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return place, result


def test_compile_writes_beside_the_caller_under_the_models_name(compiled):
    place, _ = compiled
    assert [path.name for path in place.iterdir()] == ["small.asap"]
    assert (place / "small.asap" / "model.onnx").is_file()


def test_compile_shows_stages_with_their_times_on_stderr(compiled):
    _, result = compiled
    # Between the two NVIDIA's compiler is said to be at work.
    stderr = [line.split() for line in result.stderr.splitlines() if "NVIDIA's compiler" not in line]
    begins, lines = stderr[::2], stderr[1::2]
    stages = ["load", "capture", "find", "select", "rewrite", "check", "export", "engine", "verify", "measure"]
    assert [line[0] for line in lines] == [*stages, "figures"]
    assert begins == [[line[0], "begins"] for line in lines]
    for line in lines:
        assert float(line[1]) >= 0
        assert line[2] == "s"


def test_compile_prints_two_tables_and_where_the_files_are(compiled):
    _, result = compiled
    assert "Sinkhorn attention" in result.stdout
    assert "Latency in ONNX Runtime" in result.stdout
    for variant in ("teacher", "exact", "truncated", "softmax", "compiled"):
        assert any(variant in line.split() for line in result.stdout.splitlines())
    for file in ("model.onnx", "model.engine", "operator.safetensors", "report.json"):
        assert f"small.asap/{file}" in result.stdout
    assert "\x1b" not in result.stdout  # no colours in a pipe


def test_compile_says_in_one_line_that_an_engine_was_built_and_not_run(compiled):
    place, result = compiled
    reason = json.loads((place / "small.asap" / "report.json").read_text())["engine"]["not_run"]
    lines = [line for line in result.stdout.splitlines() if "not run" in line]
    assert lines == ([] if reason is None else [f"The engine was built and not run: {reason}"])


def test_an_engine_that_fails_is_a_warning_and_all_else_is_whole(small, monkeypatch):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", crash)
    result = run("compile", small, "--out", "out", "--fidelity", "relc<=1", *QUICK)
    assert result.exit_code == 0, result.stderr
    reason = "TensorRT's compiler crashed on the model (SIGSEGV)"
    hint = "report the model, and this line"
    lines = result.stderr.splitlines()
    assert lines[lines.index(f"warning: no engine was built: {reason}") + 1] == f"hint: {hint}"
    files = {"figures.npz", "manifest.json", "model.onnx", "operator.safetensors", "report.html", "report.json"}
    files |= {"README.md", "samples.npz", "expected.npz", "held_out.npz", "latency.npz"}
    assert {path.name for path in Path("out").iterdir()} == files
    report = json.loads(Path("out/report.json").read_text())
    expected = {"status": "failed", "reason": reason, "hint": hint, "node": None, "not_run": None, "layers": []}
    assert report["engine"] == expected
    jsonschema.validate(report, json.loads((ROOT / "docs" / "report.schema.json").read_text()))


def test_an_engine_that_was_asked_for_by_name_and_fails_exits_with_1(small, monkeypatch):
    monkeypatch.setattr(asapc.backends.tensorrt.builder, "CHILD", "raise RuntimeError('no licence')")
    error, _ = assert_user_error(run("compile", small, "--target", "tensorrt-rtx", *QUICK))
    assert "no licence" in error
    assert list(Path.cwd().iterdir()) == []


def given(report_folder: Path, monkeypatch) -> dict:
    """Let `compile` return what a run left behind, and return the report's data."""
    data = json.loads((report_folder / "report.json").read_text())
    report = asapc.CompileReport(report_folder, data)
    monkeypatch.setattr(asapc.commands.compile, "compile_model", lambda *args: report)
    return data


def test_compile_json_prints_the_report_alone_on_stdout(compiled, small, monkeypatch):
    data = given(compiled[0] / "small.asap", monkeypatch)
    result = run("compile", small, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == data


def test_compile_quiet_prints_nothing(compiled, small, monkeypatch):
    given(compiled[0] / "small.asap", monkeypatch)
    result = run("compile", small, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_quiet_still_prints_errors():
    assert_user_error(run("compile", "missing.pt", "--quiet"))


def test_a_dump_keeps_the_stages_that_ran_where_a_later_one_fails(small, monkeypatch):
    def refuse(*args):
        raise FidelityError("missed", "try again")

    monkeypatch.setattr(asapc.commands.compile, "choose", refuse)
    assert_user_error(run("compile", small, "--dump", "stages", *QUICK), code=3)
    files = sorted(str(path) for path in Path().rglob("*.txt"))
    assert files == ["stages/01-capture.txt", "stages/02-build-plans.txt", "stages/03-find.txt"]
    assert "blocks.0.attention" in Path(files[-1]).read_text()
    assert [path.name for path in Path().iterdir()] == ["stages"]
