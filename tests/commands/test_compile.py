"""The whole line on the shipped checkpoint: what it writes, and that what it says of it is true."""

import hashlib
import json
import sys
from math import inf
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import documents
from helpers.command import write_checkpoint
from helpers.paths import ROOT
from helpers.quick import quick_compilation
from helpers.tolerances import FLOAT32, LOGITS
from safetensors.numpy import load_file

import asapc
from asapc.config import CompileConfig
from asapc.loading.model import load_model
from asapc.planning.bases import COORDINATES
from asapc.timing.ratios import paired_ratio
from asapc.training.corpora import digits
from asapc.writing.report import CompileReport

MODELS = ["model.engine", "model.onnx", "operator.safetensors"]
SAMPLES = ["expected.npz", "held_out.npz", "samples.npz"]
FILES = sorted(
    ["README.md", "figures.npz", "latency.npz", "manifest.json", *MODELS, *SAMPLES, "report.html", "report.json"]
)


@pytest.fixture(scope="module")
def report(readme_folder):
    """The shipped checkpoint, compiled with the README's command."""
    folder = readme_folder / "digits.asap"
    return CompileReport(folder, json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="module")
def run_onnx(report):
    session = onnxruntime.InferenceSession(str(report.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def hop(report, name: str) -> dict:
    return next(hop for hop in report.data["fidelity"]["hops"] if hop["name"] == name)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_folder_holds_every_artefact_and_nothing_else(report):
    assert sorted(path.name for path in report.folder.iterdir()) == FILES
    assert not [path.name for path in report.folder.parent.iterdir() if path.name.startswith(".")]


def test_the_manifest_has_the_hash_and_the_size_of_every_file(report, shipped):
    manifest = json.loads((report.folder / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == FILES
    for name, facts in manifest["files"].items():
        path = report.folder / name
        assert facts == {"sha256": sha256(path), "bytes": path.stat().st_size}
    assert manifest["model_sha256"] == sha256(shipped)


def test_report_json_is_the_report_that_is_returned(from_file):
    assert json.loads((from_file.folder / "report.json").read_text()) == from_file.data
    assert from_file.data["schema"] == "asapc.report/3"


def test_the_report_names_the_checkpoint_by_its_hash(report, shipped):
    assert report.data["model"]["sha256"] == sha256(shipped)
    loaded = load_model(shipped)
    assert report.data["model"]["parameters"] == loaded.parameters
    assert report.data["fidelity"]["samples"] == len(loaded.held_out)


def test_the_report_lists_the_artefacts_with_their_hashes(report):
    artifacts = {artifact["kind"]: artifact for artifact in report.data["artifacts"]}
    assert set(artifacts) == {"onnx", "engine", "operator"}
    for artifact in artifacts.values():
        assert artifact["sha256"] == sha256(report.folder / artifact["path"])


@pytest.mark.parametrize("name", FILES)
def test_every_file_can_be_read_by_whom_the_umask_allows(name, report):
    """A folder that was compiled by one user is served by another."""
    plain = report.folder.parent / "plain"
    plain.touch()
    modes = (report.folder / name).stat().st_mode, plain.stat().st_mode
    plain.unlink()
    assert modes[0] == modes[1]


def test_the_onnx_file_passes_the_checker_and_says_where_it_is_from(report, shipped):
    model = onnx.load(report.folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == {"asapc.version": asapc.__version__, "asapc.source_sha256": sha256(shipped)}


@pytest.mark.parametrize("name", ["model.onnx", "operator.safetensors", "model.engine"])
def test_no_path_of_this_machine_is_in_an_artefact(name, report):
    data = (report.folder / name).read_bytes()
    for trace in (str(ROOT), str(Path.home()), sys.prefix, str(report.folder.parent)):
        assert trace.encode() not in data
    if name == "model.onnx":
        assert b"/work" not in data
        assert b".py" not in data


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_the_onnx_file_takes_every_batch(batch, run_onnx, shipped):
    images = load_model(shipped).held_out.inputs["images"]
    logits = run_onnx(images[:batch])
    assert logits.shape == (batch, 10)
    # A sample's answer does not depend on its batch.
    assert np.allclose(logits[:1], run_onnx(images[:1]), rtol=0, atol=LOGITS)


def test_onnx_runtime_gives_what_the_rewritten_graph_gives(report):
    assert 0 < hop(report, "export")["max_abs"] <= LOGITS


def test_the_capture_changes_nothing_and_the_amortisation_is_where_the_error_is(report):
    hops = report.data["fidelity"]["hops"]
    assert [each["name"] for each in hops] == ["capture", "amortisation", "export"]
    assert max(hops, key=lambda each: each["rel"])["name"] == "amortisation"


def test_the_compiled_model_agrees_with_its_teacher(report):
    fidelity = report.data["fidelity"]
    assert fidelity["agreement"] >= 0.98
    assert fidelity["metric"]["teacher"] >= 0.95
    assert abs(fidelity["metric"]["compiled"] - fidelity["metric"]["teacher"]) <= 0.005


def test_the_agreement_in_the_report_is_that_of_the_file(report, run_onnx, shipped):
    loaded = load_model(shipped)
    images, labels = loaded.held_out.inputs["images"], loaded.held_out.labels.numpy()
    with torch.no_grad():
        teacher = loaded.module(images).argmax(dim=-1).numpy()
    compiled = run_onnx(images).argmax(axis=-1)
    fidelity = report.data["fidelity"]
    # One sample on the border between two classes may fall to either side in another batch.
    one = 1 / len(images) + 1e-9
    assert abs((teacher == compiled).mean() - fidelity["agreement"]) <= one
    assert abs((compiled == labels).mean() - fidelity["metric"]["compiled"]) <= one


def test_truncated_sinkhorn_of_as_many_half_steps_agrees_less(report):
    variants = report.data["fidelity"]["variants"]
    assert variants["truncated"]["agreement"] < variants["compiled"]["agreement"]
    assert variants["truncated"]["logits_rel"] > 2 * variants["compiled"]["logits_rel"]
    assert variants["softmax"]["agreement"] < variants["compiled"]["agreement"]


def test_the_exact_variants_are_exact(report):
    variants = report.data["fidelity"]["variants"]
    for name in ("teacher", "exact"):
        assert variants[name]["agreement"] == 1.0
        assert variants[name]["logits_rel"] < FLOAT32


def test_every_site_is_found_and_given_a_fixed_depth(report):
    sites = report.data["sites"]
    assert len(sites) >= 2
    for site in sites:
        assert (site["half_steps"], site["last"], site["epsilon"]) == (40, "rows", 0.25)
        assert (site["queries"], site["keys"]) == (64, 64)
        assert site["choice"]["operator"] == "sliced_dual"
        assert site["choice"]["half_steps"] < 20
        assert site["fidelity"]["row_marginal_error"] < FLOAT32


def test_every_variant_is_measured_at_every_batch(report):
    runs = report.data["latency"]["runs"]
    names = {"teacher", "exact", "truncated", "softmax", "compiled"}
    assert {(run["name"], run["batch"]) for run in runs} == {(name, batch) for name in names for batch in (1, 32)}
    for run in runs:
        assert 0 < run["p50_ms"] <= (run["p90_ms"] or inf) <= (run["p99_ms"] or inf)
        assert run["runtime"] == "onnxruntime"
    assert report.data["latency"]["batch"] == 32


def test_the_ratios_follow_from_the_raw_times_that_are_kept(report):
    latency = report.data["latency"]
    times = np.load(report.folder / "latency.npz")
    for ratio in latency["ratios"]:
        if ratio["finding"] != "identical":
            of_name, own = (times[f"{ratio['batch']}.{name}"] for name in (ratio["name"], "compiled"))
            assert ratio["value"] == paired_ratio(of_name, own).value
    at_32 = {ratio["name"]: ratio["value"] for ratio in latency["ratios"] if ratio["batch"] == 32}
    assert latency["speedup_vs_teacher"] == at_32["teacher"]
    assert latency["ratio_to_softmax"] == 1 / at_32["softmax"]


def test_the_loop_is_gone_from_the_graph(report, shipped):
    nodes = onnx.load(report.folder / "model.onnx").graph.node
    sites = len(report.data["sites"])
    # The teacher takes 40 of these a site.
    assert sum(node.op_type in ("ReduceLogSumExp", "Log") for node in nodes) < 10 * sites


def test_the_engine_is_there_and_says_for_which_targets(report):
    engine = next(artifact for artifact in report.data["artifacts"] if artifact["kind"] == "engine")
    assert (report.folder / "model.engine").stat().st_size > 10_000
    assert engine["builder"].startswith("tensorrt")
    assert engine["targets"]
    assert all(target.startswith("SM") for target in engine["targets"])
    assert not set(engine["targets"]) & set(engine["refused"])
    assert all(engine["refused"].values())  # with a reason each


def test_the_operators_parameters_are_there_for_every_site(report):
    tensors = load_file(report.folder / "operator.safetensors")
    for site in report.data["sites"]:
        heads, size, name = site["heads"], site["head_dim"], site["name"]
        coordinates = min(size, COORDINATES)
        assert tensors[f"{name}.score_scale"].shape == (heads,)
        assert tensors[f"{name}.query_basis"].shape == (heads, size, coordinates)
        assert tensors[f"{name}.key_basis"].shape == (heads, size, coordinates)
        sets = site["choice"]["half_steps"] // 2
        assert sum(key.startswith(f"{name}.weights.") for key in tensors) == sets
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in tensors.values())


@pytest.fixture(scope="module")
def from_file(shipped, tmp_path_factory):
    """The shipped checkpoint compiled exactly, with samples from a file."""
    folder = tmp_path_factory.mktemp("from_file")
    images, labels = digits()
    np.savez(folder / "samples.npz", images=images[:96].numpy(), labels=labels[:96].numpy())
    config = CompileConfig(
        out=folder / "out", calib=folder / "samples.npz", level=1, batches=(1, 2), seconds=0.2, threads=1
    )
    with quick_compilation():
        return asapc.compile(shipped, config=config)


def test_samples_from_a_file_are_used_and_a_quarter_of_them_held_out(from_file):
    fidelity = from_file.data["fidelity"]
    assert fidelity["samples"] == 24
    assert fidelity["metric"]["name"] == "accuracy"
    assert 0.5 < fidelity["metric"]["teacher"] <= 1
    assert {run["batch"] for run in from_file.data["latency"]["runs"]} == {1, 2}


def test_the_first_level_rewrites_exactly_and_its_engine_builds(from_file):
    assert {site["choice"]["operator"] for site in from_file.data["sites"]} == {"exact"}
    assert from_file.data["fidelity"]["logits_rel"] < FLOAT32
    engine = next(artifact for artifact in from_file.data["artifacts"] if artifact["kind"] == "engine")
    assert engine["targets"]


LIBRARY = "import asapc; asapc.compile('small.pt', out='library', target='onnx', **{})"


def test_the_command_and_the_library_give_the_same_bytes(tmp_path):
    """In two processes with two hash seeds, so that the order of a set cannot hide."""
    write_checkpoint(tmp_path / "small.pt")
    arguments = ["--out", "command", "--target", "onnx", "--batch", "1", "--seconds", "0.05", "--threads", "1"]
    options = {"batches": (1,), "seconds": 0.05, "threads": 1}
    command = [*documents.quick_words(), "compile", "small.pt", *arguments]
    for seed, words in (("1", command), ("12345", documents.quick_words(LIBRARY.format(options)))):
        documents.run(words, tmp_path, PYTHONHASHSEED=seed)
    for name in ("operator.safetensors", "model.onnx"):
        one, other = (tmp_path / folder / name for folder in ("command", "library"))
        assert one.read_bytes() == other.read_bytes(), name
