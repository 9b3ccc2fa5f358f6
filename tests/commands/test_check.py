"""The gate on a small model, with times made up: what is timed never decides a test."""

import base64
import csv
import json
import shutil
import zlib
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from helpers.command import assert_user_error, run, write_checkpoint
from helpers.folders import relist, tamper
from helpers.paths import ROOT
from helpers.quick import quick_compilation
from junitparser import JUnitXml

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands import bench, gates
from asapc.commands.bench import BenchOptions, bench_folders, lengthened
from asapc.commands.compile import compile_model
from asapc.commands.folders import Folder, graph_hash
from asapc.commands.reference import pack_reference
from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.loading.baseline import digest
from asapc.passes.onnx import weights
from asapc.timing import compare
from asapc.types.samples import Samples

LOOSE = ("relc<=1", "agreement>=0")


def schema(name: str) -> dict:
    return json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model compiled to its exact form."""
    folder = tmp_path_factory.mktemp("gates")
    path = write_checkpoint(folder / "model.pt", iterations=2)
    with quick_compilation():
        options = {"level": 1, "fidelity": LOOSE, "batches": (1, 2), "target": "onnx", "threads": 1}
        compile_model(path, CompileConfig(out=folder / "out", **options))
    return folder / "out"


@pytest.fixture(scope="module")
def head(base, tmp_path_factory) -> Path:
    """The same with another graph: its logits are scaled by a hair."""
    folder = tmp_path_factory.mktemp("head") / "out"
    shutil.copytree(base, folder)
    model = onnx.load(folder / "model.onnx")
    weight = next(w for w in model.graph.initializer if w.data_type == 1)
    values = onnx.numpy_helper.to_array(weight) * np.float32(1 + 1e-6)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "model.onnx")
    refit(folder)
    return folder


def refit(folder: Path) -> None:
    """Make report and manifest fit the files of a folder."""
    relist(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    report = json.loads((folder / "report.json").read_text())
    for artifact in report["artifacts"]:
        artifact["sha256"] = files[artifact["path"]]["sha256"]
    (folder / "report.json").write_text(json.dumps(report))
    relist(folder)


@pytest.fixture
def clock(monkeypatch):
    """Makes times up: 1 ms for every model but those that the dict which it returns says otherwise of."""
    milliseconds: dict[str, float] = {}

    def made_up(models, samples, batch, effort, settled=None, advance=None):
        draw = np.random.default_rng(0)
        for name in models:  # whether they open is part of the test
            models[name]()(samples[:1])
        return {name: milliseconds.get(name, 1.0) * np.exp(draw.normal(0, 0.003, (12, 10))) for name in models}

    monkeypatch.setattr(gates, "time_blocks", made_up)
    monkeypatch.setattr(compare, "time_blocks", made_up)
    return milliseconds


@pytest.fixture
def baseline(base, clock, tmp_path) -> Path:
    result = run("check", base, "--save-baseline", tmp_path / "baseline.json", "--threads", 1)
    assert result.exit_code == 0, result.output
    return tmp_path / "baseline.json"


def test_a_baseline_keeps_to_its_schema_and_is_passed_by_what_it_was_taken_of(base, baseline):
    content = json.loads(baseline.read_text())
    jsonschema.validate(content, schema("baseline"))
    assert [r["batch"] for r in content["runs"]] == [1, 2]
    result = run("check", base, "--baseline", baseline, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout


def test_a_baseline_is_of_the_samples_lengths_and_of_the_file_that_the_runtime_runs(base, tmp_path):
    folder, longer = Folder.at(base), Samples({"images": torch.zeros(2, 4, 9)})
    (short,) = folder.samples(None).inputs.values()
    assert gates.fingerprint(folder, folder.samples(None), 1, "cpu")["inputs"] == f"images (4, 4) {short.dtype}"
    assert gates.fingerprint(folder, longer, 1, "cpu")["inputs"] == "images (4, 9) torch.float32"
    shutil.copytree(base, tmp_path / "half")
    shutil.copy(base / "model.onnx", tmp_path / "half" / "model.float16.onnx")
    half = Folder(tmp_path / "half", folder.report)
    precisions = [gates.fingerprint(half, longer, 1, runtime)["precision"] for runtime in ("cpu", "cuda")]
    assert precisions == ["float32", "float16"]
    assert [half.deployed(runtime).name for runtime in ("cpu", "cuda")] == ["model.onnx", "model.float16.onnx"]


def test_a_slowdown_against_a_baseline_ends_with_4_in_every_output(base, baseline, clock, tmp_path):
    clock.update({"head": 1.1, "head again": 1.1})
    files = {name: tmp_path / name for name in ("junit", "markdown", "github-benchmark")}
    outputs = [part for name, path in files.items() for part in (f"--{name}", path)]
    result = run("check", base, "--baseline", baseline, "--threads", 1, "--json", *outputs)
    assert_user_error(result, 4)
    data = json.loads(result.stdout)
    jsonschema.validate(data, schema("check"))
    assert (data["outcome"], data["exit_code"]) == ("regression", 4)
    cases = [case for suite in JUnitXml.fromfile(str(files["junit"])) for case in suite]
    assert [bool(case.result) for case in cases] == [False, False, True, True]
    assert "FAILED: slower" in files["markdown"].read_text()
    assert "| 1 | 1.1" in files["markdown"].read_text()
    entries = json.loads(files["github-benchmark"].read_text())
    assert [entry["unit"] for entry in entries] == ["ms", "ms"]
    assert entries[0]["value"] == pytest.approx(1.1, rel=0.01)
    assert run("check", base, "--baseline", baseline, "--threads", 1, "--max-slowdown", "15%").exit_code == 0


def test_a_baseline_carries_the_graph_of_its_model_without_the_weights(base, monkeypatch):
    monkeypatch.setattr(weights, "MAX_KEPT", 16)
    own = [w.raw_data for w in onnx.load(base / "model.onnx").graph.initializer if len(w.raw_data) > 16 * 4]
    reference = zlib.decompress(base64.b64decode(pack_reference(base / "model.onnx")))
    assert own
    assert all(data not in reference for data in own)
    assert [value.name for value in onnx.load_model_from_string(reference).graph.input] == ["images"]


@pytest.mark.parametrize("kind", ["text", "cut", "other", "file", "large"])
def test_a_reference_model_from_strangers_is_refused_in_one_line(kind, base, baseline, tmp_path):
    content = json.loads(baseline.read_text())
    model = onnx.load_model_from_string(zlib.decompress(base64.b64decode(content["reference"])))
    if kind == "file":
        tensor = model.graph.initializer.add(name="w", dims=[2], data_type=1, data_location=1)
        tensor.external_data.add(key="location", value="../../etc/passwd")
    if kind == "large":
        model.graph.initializer.add(name="w", dims=[2**40], data_type=1)
    packed = base64.b64encode(zlib.compress(b"no model" if kind == "other" else model.SerializeToString())).decode()
    content["reference"] = {"text": "?", "cut": packed[: len(packed) // 8 * 4]}.get(kind, packed)
    del content["sha256"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "sha256": digest(content)}))
    error, _ = assert_user_error(run("check", base, "--baseline", other, "--threads", 1))
    assert "reference model" in error


def test_what_cannot_be_checked_replaces_what_an_earlier_check_found(base, baseline, tmp_path):
    files = {name: tmp_path / name for name in ("junit", "markdown", "github-benchmark")}
    for path in files.values():
        path.write_text("passed")
    outputs = [part for name, path in files.items() for part in (f"--{name}", path)]
    content = json.loads(baseline.read_text())
    content["fingerprint"]["cpu"] = "another"
    del content["sha256"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "sha256": digest(content)}))
    error, _ = assert_user_error(run("check", base, "--baseline", other, "--threads", 1, *outputs), 5)
    (case,) = (case for suite in JUnitXml.fromfile(str(files["junit"])) for case in suite)
    assert "is not comparable" in error
    assert [result.message for result in case.result] == [error.removeprefix("error: ")]
    assert files["markdown"].read_text().startswith("NOT CHECKED")
    assert json.loads(files["github-benchmark"].read_text()) == []


def test_what_is_unstable_ends_with_6_and_is_no_baseline(base, baseline, clock, tmp_path):
    clock.update({"head again": 1.5})
    clock.update({"head": 1.1})
    result = run("check", base, "--baseline", baseline, "--threads", 1, "--json")
    assert_user_error(result, 6)
    assert json.loads(result.stdout)["outcome"] == "unstable"
    result = run("check", base, "--save-baseline", tmp_path / "none.json", "--threads", 1, "--json")
    assert_user_error(result, 6)
    jsonschema.validate(json.loads(result.stdout), schema("error"))
    assert not (tmp_path / "none.json").exists()


def test_a_baseline_of_another_machine_or_model_ends_with_5(base, baseline, head):
    content = json.loads(baseline.read_text())
    for name in content["fingerprint"]:
        other = {**content, "fingerprint": {**content["fingerprint"], name: "another"}}
        baseline.write_text(json.dumps({**other, "sha256": digest(other)}))
        result = run("check", base, "--baseline", baseline, "--threads", 1, "--json")
        error, _ = assert_user_error(result, 5)
        assert f"{name} was 'another'" in error
        assert json.loads(result.stdout)["exit_code"] == 5
    baseline.write_text(json.dumps(content))
    assert_user_error(run("check", base, "--baseline", baseline, "--threads", 2), 5)
    assert_user_error(run("check", base, "--baseline", baseline, "--threads", 1, "--batch", 3), 5)
    baseline.write_text(json.dumps(content)[:-100])
    assert_user_error(run("check", base, "--baseline", baseline, "--threads", 1), 1)


def test_one_file_beside_itself_is_identical_and_nothing_is_timed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "time_blocks", None)
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    model = onnx.load(copy / "model.onnx")
    model.producer_version, model.graph.node[0].name = "another", "another"
    onnx.save(model, copy / "model.onnx")
    refit(copy)
    result = run("check", base, "--relative", copy, "--json")
    assert result.exit_code == 0, result.output
    assert [gate["outcome"] for gate in json.loads(result.stdout)["gates"]] == ["identical"] * 2


def test_another_graph_is_timed_in_turns(base, head, clock):
    assert graph_hash(base / "model.onnx") != graph_hash(head / "model.onnx")
    assert run("check", head, "--relative", base).exit_code == 0
    clock.update({"base": 0.9})
    result = run("check", head, "--relative", base)
    assert_user_error(result, 4)
    assert "1.11" in result.stdout


def test_fidelity_is_gated_by_the_same_command_on_the_samples_that_the_folder_keeps(base, head, tmp_path):
    assert run("check", base).exit_code == 0
    for term in ("relc<=1e-12", "column-marginal<=1e-12", "output-error<=0"):
        result = run("check", base, "--fidelity", term, "--json")
        assert_user_error(result, 3)
        assert json.loads(result.stdout)["outcome"] == "fidelity"
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).random((4, 4, 4), dtype=np.float32))
    arguments = ("check", base, "--data", tmp_path / "data.npz")
    assert run(*arguments).exit_code == 0
    assert_user_error(run(*arguments, "--fidelity", "relc<=1e-12"), 3)


def test_a_missed_budget_weighs_more_than_a_slowdown(base, baseline, clock):
    clock.update({"head": 1.1, "head again": 1.1})
    assert run("check", base, "--baseline", baseline, "--threads", 1, "--fidelity", "relc<=1e-12").exit_code == 3


def test_wrong_usage_is_said_in_one_line(base, baseline, tmp_path):
    for arguments in (
        ("--baseline", baseline, "--relative", base),
        ("--baseline", tmp_path / "missing.json"),
        ("--relative", tmp_path),
        ("--max-slowdown", "a lot"),
        ("--max-slowdown", "0%"),
        ("--max-slowdown", "3"),
        ("--save-baseline", tmp_path / "new.json", "--relative", base),
        ("--save-baseline", tmp_path / "new.json", "--baseline", baseline),
        ("--runtime", "gpu"),
        ("--data", tmp_path / "missing.npz"),
    ):
        assert_user_error(run("check", base, *arguments))
    assert not (tmp_path / "new.json").exists()
    without = tamper(base, tmp_path / "old", "report.json", lambda report: None)
    (without / "held_out.npz").unlink()
    relist(without)
    assert_user_error(run("check", without))


@pytest.mark.parametrize(("text", "share"), [("3%", 0.03), ("0.5 %", 0.005), ("0.03", 0.03), ("150%", 1.5)])
def test_a_share_is_per_cent_or_a_number(text, share):
    assert gates.parse_share(text) == pytest.approx(share)


def test_folders_and_rivals_are_measured_side_by_side(base, head, clock, tmp_path):
    clock.update({str(head): 1.5, "softmax": 0.5})
    table, rows = tmp_path / "bench.md", tmp_path / "bench.csv"
    arguments = ("--against", "exact, softmax", "--batch", 2, "--threads", 1, "--markdown", table, "--csv", rows)
    result = run("bench", base, head, *arguments, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    jsonschema.validate(data, schema("bench"))
    [measurement] = data["measurements"]
    findings = {row["name"]: row["ratio"] and row["ratio"]["finding"] for row in measurement["rows"]}
    assert findings == {str(base): None, str(head): "slower", "exact": "identical", "softmax": "faster"}
    assert f"| {head} |" in table.read_text()
    assert all(np.shape(row["ms"]) == (12, 10) and row["samples"] == 120 for row in measurement["rows"])
    medians = {row["name"]: np.median(row["ms"]) for row in measurement["rows"]}
    assert medians == pytest.approx({str(base): 1, str(head): 1.5, "exact": 1, "softmax": 0.5}, rel=0.01)
    with rows.open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(findings)


def test_a_bench_takes_every_combination(base, clock):
    options = BenchOptions(batches=(1, 2), threads=(1, 2))
    measurements = bench_folders([base], options)["measurements"]
    assert [(m["threads"], m["batch"]) for m in measurements] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_no_two_models_of_a_bench_have_one_name(base, tmp_path):
    assert_user_error(run("bench", base, base))
    with pytest.raises(OptionError, match="called exact"):
        bench_folders([Path("exact")], BenchOptions(against=("exact",)))


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(base, head, tmp_path, monkeypatch):
    for module in (gates, compare):
        monkeypatch.setattr(module, "time_blocks", None)
    check, bench = ("check", head, "--relative", base), ("bench", head)
    for command, flags in ((check, ("junit", "markdown", "github-benchmark")), (bench, ("markdown", "csv"))):
        for flag in flags:
            error, _ = assert_user_error(run(*command, f"--{flag}", tmp_path))
            assert "is a folder" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_runtime_that_is_not_there_is_said_in_one_line(base, head):
    for arguments in (("check", head, "--relative", base), ("bench", base)):
        error, _ = assert_user_error(run(*arguments, "--runtime", "cuda"))
        assert "finds no CUDA" in error


def test_each_runtime_times_the_file_that_is_deployed_there(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "half")
    shutil.copy(base / "model.onnx", tmp_path / "half" / "model.float16.onnx")
    relist(tmp_path / "half")
    opened = set()

    def open_file(path, runtime, threads, inputs):
        opened.add((runtime, path.name))
        return OnnxRuntimeRunner(path, threads)

    monkeypatch.setattr(bench, "open_file", open_file)
    options = BenchOptions(batches=(1,), threads=(1,), runtimes=("cpu", "cuda"), seconds=0.1)
    measurements = bench_folders([tmp_path / "half"], options)["measurements"]
    assert [measurement["runtime"] for measurement in measurements] == ["cpu", "cuda"]
    assert opened == {("cpu", "model.onnx"), ("cuda", "model.float16.onnx")}


def test_a_length_needs_an_open_axis_and_a_rival_a_name(base):
    folder = Folder.at(base)
    with pytest.raises(OptionError, match="no open axis"):
        lengthened(folder.samples(None), folder, 7)
    assert_user_error(run("bench", base, "--against", "fastest"))
