"""`benchmarks/gpu.py` runs with torch, numpy and triton alone, and without a GPU as a check of itself."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from helpers.paths import ROOT

# What a bare machine lacks; an import of any of them fails.
ABSENT = ("onnx", "onnxruntime", "onnxscript", "onnx_ir", "scipy", "safetensors", "jsonschema", "typer", "rich")


def benchmark(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark where these packages are missing."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.argv = {['gpu.py', *args]!r}; "
        "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "layers.json"
    done = benchmark("--quick", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_form_is_right_in_every_precision_before_it_is_timed(quick):
    printed, data = quick
    rows = {(row["form"], row["length"], row["dtype"]): row for row in data["layers"]}
    forms = {form for form, _, _ in rows}
    assert {"teacher", "softmax, fused", "exact 40", "exact 40, fused", "hinges, 1", "soft-sort transport"} <= forms
    assert len(rows) == len(forms) * 2 * 3
    assert [row for row in rows.values() if "skipped" in row] == []
    assert all(row["ms"]["launched"] > 0 and row["error"] < 0.1 for row in rows.values())
    assert max(row["error"] for row in rows.values() if row["dtype"] == "float32") < 1e-4
    assert printed.count(" ms, error ") == len(rows)


def test_the_results_name_the_device_and_the_versions(quick):
    environment = quick[1]["environment"]
    assert environment["device"]
    assert environment["packages"]["torch"] == metadata.version("torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = benchmark("--quick")
    assert (done.returncode, done.stderr.strip().count("\n")) == (1, 0)
    assert "torch sees no GPU" in done.stderr


def test_a_form_that_does_not_exist_is_refused_with_those_that_do():
    done = benchmark("--quick", "--device", "cpu", "--only", "magic")
    assert done.returncode == 1
    assert "no such form: magic; there are softmax, fused" in done.stderr
