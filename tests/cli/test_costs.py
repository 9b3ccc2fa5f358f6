"""`asapc costs`, and compilations with the file that it writes."""

import json
from pathlib import Path

import jsonschema
import pytest
from helpers.command import QUICK, assert_user_error, run
from helpers.paths import ROOT

from asapc.commands import costs
from asapc.planning.costs import shipped, work
from asapc.planning.trials import operators
from asapc.planning.unit_costs import Trial


@pytest.fixture(params=[0.0])
def timed(request, monkeypatch) -> None:
    """Operators that take what they cost by the costs that asapc carries, but for a share of noise."""

    def time(shape, names, *args):
        modules = operators(shape.heads, shape.head_dim)
        works = {name: work(shape, modules[name]) for name in names}
        kinds = shipped().milliseconds
        return {
            name: Trial(of, sum(n * kinds[kind] for kind, n in of.items()) * (1 + request.param * (-1) ** i))
            for i, (name, of) in enumerate(works.items())
        }

    monkeypatch.setattr(costs, "time_operators", time)


@pytest.mark.usefixtures("timed")
def test_costs_are_written_whole_and_never_over_another_file():
    result = run("costs", "--target", "onnx", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("costs.json: costs of ")
    assert result.stdout.endswith("estimates are off by 0% in the median\n")
    assert "warning" not in result.stderr
    assert result.stderr.count("12 operators at batch") == 5
    content = Path("costs.json").read_text()
    jsonschema.validate(json.loads(content), json.loads((ROOT / "docs" / "costs.schema.json").read_text()))
    error, hint = assert_user_error(run("costs", "--target", "onnx"))
    assert "costs.json exists already" in error
    assert "--force" in hint
    assert run("costs", "--target", "onnx", "--out", "costs.json", "--force").exit_code == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["costs.json"]


@pytest.mark.parametrize("timed", [0.6], indirect=True)
@pytest.mark.usefixtures("timed")
def test_costs_that_estimate_poorly_come_with_a_warning():
    result = run("costs", "--target", "onnx")
    assert result.exit_code == 0
    assert "warning: estimates are off by" in result.stderr
    assert "measure again when nothing else runs" in result.stderr


def test_nothing_is_written_where_costs_cannot_be_measured():
    assert_user_error(run("costs", "--target", "tensorrt-rtx"))
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.usefixtures("timed", "quick")
def test_the_report_names_the_costs_and_one_file_of_them_gives_the_same_bytes(small):
    run("costs", "--target", "onnx")
    for out in ("one", "two"):
        result = run("compile", small, "--costs", "costs.json", "--target", "onnx", "--out", out, *QUICK)
        assert result.exit_code == 0, result.stderr
    for name in ("model.onnx", "operator.safetensors"):
        assert (Path("one") / name).read_bytes() == (Path("two") / name).read_bytes()
    report = json.loads(Path("one/report.json").read_text())
    assert report["costs"]["file"] == "costs.json"
    assert report["costs"]["model"] == "cpu"
    p50 = {row["name"]: row["p50_ms"] for row in report["latency"]["runs"]}
    assert report["costs"]["measured_ms"] == pytest.approx(p50["compiled"] - p50["softmax"])
    assert "by estimate" in result.stdout


@pytest.mark.usefixtures("quick")
def test_costs_of_a_gpu_are_not_compared_with_what_was_measured_on_the_cpu(small):
    result = run("compile", small, "--target", "cuda", "--out", "out", *QUICK)
    assert result.exit_code == 0, result.stderr
    report = json.loads(Path("out/report.json").read_text())
    assert report["engine"]["status"] == "omitted"
    facts = report["costs"]
    assert (facts["model"], facts["device"], facts["file"]) == ("cuda, float32", "NVIDIA H200", None)
    assert (facts["estimated_ms"], facts["measured_ms"]) == (None, None)
    reason = "these are the costs of a GPU, and latency was measured on the CPU"
    assert f"Costs: cuda, float32, NVIDIA H200; not compared with what was measured: {reason}" in result.stdout
