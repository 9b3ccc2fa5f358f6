"""A compiled folder is checked again: on the data it was compiled with, on other data, and when something is amiss."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import assert_user_error, run, write_checkpoint
from helpers.fitted import site
from helpers.quick import quick_compilation

from asapc import showing
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands import verify as verify_module
from asapc.commands.compile import compile_model
from asapc.commands.verify import Outside, budget_of, on_all_scores, plans_outside, verify_model, verify_outputs
from asapc.config import CompileConfig
from asapc.errors import CheckpointError, FidelityError, SamplesError
from asapc.loading.model import load_model
from asapc.models.language import LanguageModel
from asapc.types.budget import Bound
from asapc.types.choices import Candidate, Choice, Selection
from asapc.types.results import Fidelity
from asapc.types.samples import Samples
from asapc.writing.words import outside_note

LOOSE = ("relc<=1", "agreement>=0")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A folder with a small model, what it was compiled to, and samples of the kind it was compiled with."""
    folder = tmp_path_factory.mktemp("recheck")
    path = write_checkpoint(folder / "model.pt")
    compile_model(path, CompileConfig(out=folder / "out", fidelity=LOOSE, batches=(2,), seconds=0.1, target="onnx"))
    images = torch.load(path, weights_only=True)["held_out"]["inputs"]["images"].numpy()
    np.savez(folder / "same.npz", images=images, labels=np.arange(8) % 3)
    np.savez(folder / "sharp.npz", images=30 * images)
    return folder


def test_on_the_data_it_was_compiled_with_it_says_what_the_report_says(compiled):
    verification = verify_model(compiled / "out", compiled / "same.npz")
    report = json.loads((compiled / "out" / "report.json").read_text())
    assert verification.fidelity.logits_rel == pytest.approx(report["fidelity"]["logits_rel"], rel=1e-3)
    assert verification.fidelity.agreement == report["fidelity"]["agreement"]
    [site] = report["sites"]
    assert verification.fidelity.sites[site["name"]].relc == pytest.approx(site["fidelity"]["relc"], rel=1e-3)
    assert site["choice"]["operator"] != "keep"
    assert verification.fidelity.metric is not None


def test_stored_outputs_do_in_place_of_the_teacher(compiled, tmp_path):
    images = torch.from_numpy(np.load(compiled / "same.npz")["images"])
    teacher = load_model(compiled / "model.pt").module
    with torch.no_grad():
        np.savez(tmp_path / "logits.npz", logits=teacher(images).numpy())
        np.savez(tmp_path / "fewer.npz", logits=teacher(images[:5]).numpy())
    verification = verify_outputs(compiled / "out", compiled / "same.npz", tmp_path / "logits.npz").fidelity
    expected = verify_model(compiled / "out", compiled / "same.npz").fidelity
    assert verification.logits_rel == pytest.approx(expected.logits_rel, rel=1e-4)
    assert (verification.agreement, verification.metric) == (expected.agreement, expected.metric)
    np.savez(tmp_path / "double.npz", images=images.double().numpy())  # numpy's default
    double = verify_outputs(compiled / "out", tmp_path / "double.npz", tmp_path / "logits.npz").fidelity
    assert double.outputs == verification.outputs
    for outputs in (tmp_path / "fewer.npz", compiled / "same.npz"):
        with pytest.raises(SamplesError, match="samples and shapes"):
            verify_outputs(compiled / "out", compiled / "same.npz", outputs)
    arguments = ("verify", compiled / "out", "--data", compiled / "same.npz", "--outputs", tmp_path / "logits.npz")
    assert run(*arguments).exit_code == 0
    assert run(*arguments, "--fidelity", "output-error<=0").exit_code == 3
    assert_user_error(run(*arguments, "--fidelity", "relc<=1"))


def test_the_budget_is_that_of_the_report_as_far_as_the_samples_tell(compiled, tmp_path):
    whole = Fidelity(8, 0.1, 0.9, None, {"logits": 0.1}, (), {}, {})
    report = {
        "budget": ["relc<=0.2", "agreement>=0.5", "metric-drop<=1"],
        "fidelity": {"outputs": {"logits": 0.1}},
    }
    # Without a term on their error, outputs may come to differ by some times what they did.
    assert budget_of(report, whole) == (Bound("agreement", 0.5), Bound("output-error", 0.4))
    assert budget_of({**report, "budget": ["output-error<=0.2"]}, whole) == (Bound("output-error", 0.2),)
    verification = verify_model(compiled / "out", compiled / "same.npz")
    assert [str(term.bound) for term in verification.verdict.terms] == ["relc<=1", "agreement>=0", "output-error<=0.05"]
    assert verification.verdict.passed


def test_outputs_that_are_others_fail_though_their_classes_agree(compiled, tmp_path):
    images = np.load(compiled / "same.npz")["images"]
    logits = OnnxRuntimeRunner(compiled / "out" / "model.onnx")(Samples({"images": torch.from_numpy(images)}))[0]
    np.savez(tmp_path / "doubled.npz", logits=2 * logits.numpy())
    with pytest.raises(FidelityError, match="output-error"):
        verify_outputs(compiled / "out", compiled / "same.npz", tmp_path / "doubled.npz")


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:1], lambda x: np.zeros_like(x), lambda x: np.ones_like(x)],
    ids=["one sample", "constant", "ones"],
)
def test_samples_that_do_not_show_the_loops_are_good_for_the_outputs(compiled, tmp_path, change):
    np.savez(tmp_path / "data.npz", images=change(np.load(compiled / "same.npz")["images"]))
    verification = verify_model(compiled / "out", tmp_path / "data.npz")
    assert verification.verdict.passed
    if verification.note:
        assert verification.fidelity.sites == {}
        with pytest.raises(SamplesError, match="relc"):
            verify_model(compiled / "out", tmp_path / "data.npz", config=CompileConfig(fidelity=("relc<=0.5",)))


def test_a_missed_budget_fails_in_python_as_in_the_command_after_it_was_shown(compiled):
    displays = []
    config = CompileConfig(fidelity=("relc<=1e-9",))
    with pytest.raises(FidelityError, match="relc"):
        verify_model(compiled / "out", compiled / "same.npz", config=config, show=displays.append)
    [verification] = displays
    assert verification.budget == config.bounds()


def test_operators_are_rated_as_they_were_compiled(compiled, monkeypatch):
    selections = []
    monkeypatch.setattr(verify_module, "operators", lambda sites, selection: selections.append(selection) or {})
    for data in ("same.npz", "sharp.npz"):
        verify_model(compiled / "out", compiled / data)
    narrow, sharp = (selection.wide for selection in selections)
    [site] = json.loads((compiled / "out" / "report.json").read_text())["sites"]
    assert narrow == sharp == ({site["name"]} if site["wide"] else frozenset())


def test_data_of_another_kind_is_out_of_range(compiled):
    assert verify_model(compiled / "out", compiled / "sharp.npz").shifted == ["blocks.0.attention"]


def test_a_range_is_widened_by_a_tenth_and_what_lies_beyond_is_outside():
    values = torch.tensor([0.85, 0.95, 1.5, 2.05, 2.15])
    assert plans_outside(values, 1.0, 2.0, samples=5) == Outside(2, 5, ((0, 0), (4, 0)))
    places = ((0, 0), (0, 4), (0, 5), (0, 9), (1, 0))
    assert plans_outside(values.repeat(4), 1.0, 2.0, samples=2) == Outside(8, 20, places)


def test_the_first_plans_outside_are_named_by_sample_and_token():
    site = {"name": "blocks.0", "outside": {"count": 8, "plans": 20, "places": [[0, 4], [1, 0]]}}
    text = "blocks.0: the scores of 8 of 20 plans spread less or more than any in calibration: "
    assert outside_note(site, samples=2) == text + "sample 0 plan 4, sample 1 plan 0, ..."
    assert outside_note(site, samples=20) == text.replace("plans", "samples") + "sample 0, sample 1, ..."
    assert outside_note({**site, "outside": None}, samples=2) == ""


@pytest.mark.parametrize(
    ("operator", "changes", "wide", "everywhere"),
    [
        ("keep", {}, False, True),
        ("exact", {}, False, False),
        ("exact", {}, True, True),
        ("exact", {"queries": 4, "keys": 4}, False, True),
        ("truncated", {"queries": 4, "keys": 4}, True, False),
    ],
)
def test_a_form_that_is_the_loop_on_all_scores_has_no_range(operator, changes, wide, everywhere):
    own = site(6, **changes)
    choices = {own.name: Choice(Candidate(operator, 6, 1.0), "")}
    assert on_all_scores(own, Selection(choices, frozenset([own.name] if wide else []))) == everywhere


STREAMS, CHARACTERS, SHARP = 2, 12, 7  # tokens of the last kind mix their streams by far sharper scores


@pytest.fixture(scope="module")
def mixing(tmp_path_factory) -> Path:
    """A folder with a model that mixes streams by small plans, compiled to truncated loops, its length open."""
    folder = tmp_path_factory.mktemp("mixing")
    torch.manual_seed(0)
    args = {"vocabulary": 8, "length": CHARACTERS, "width": 8, "depth": 1, "heads": 2, "streams": STREAMS}
    model = LanguageModel(**args, iterations=4)
    with torch.no_grad():
        channel = slice(0, None, args["width"])  # the first channel of each stream
        model.embed.weight[:, 0], model.position[:, 0] = 0.0, 0.0
        model.embed.weight[SHARP, 0] = 50.0
        scores = model.blocks[0].project.weight[2 * STREAMS :]
        scores[:, channel] = torch.tensor([6.0, -6.0, -6.0, 6.0]).unsqueeze(-1)
    tokens = torch.randint(SHARP, (32, CHARACTERS))
    path = write_checkpoint(
        folder / "model.pt",
        model="asapc.models.language:LanguageModel",
        model_args={**args, "iterations": 4},
        state_dict=model.state_dict(),
        calibration={"inputs": {"tokens": tokens[:24]}},
        held_out={"inputs": {"tokens": tokens[24:]}},
    )
    config = CompileConfig(
        out=folder / "out",
        fidelity=("output-error<=1",),
        operators="truncated",
        dynamic=f"seq=2:{CHARACTERS}",
        target="onnx",
        batches=(2,),
        seconds=0.05,
        threads=1,
    )
    with quick_compilation():
        compile_model(path, config)
    np.save(folder / "tokens.npy", tokens[:24].numpy())
    return folder


def test_a_token_outside_of_the_calibrated_range_is_counted_and_named(mixing, tmp_path):
    tokens = np.load(mixing / "tokens.npy")
    for sharp, places in ((False, ()), (True, ((3, 5),))):
        tokens[3, 5] = SHARP if sharp else tokens[3, 5]
        np.savez(tmp_path / "data.npz", tokens=tokens)
        verification = verify_model(mixing / "out", tmp_path / "data.npz")
        assert verification.outside["blocks.0"] == Outside(len(places), tokens.size, places)
        lines = [part for part in showing.verification(verification.data()) if isinstance(part, str)]
        assert any("blocks.0: the scores of 1 of" in line and "sample 3 plan 5" in line for line in lines) == sharp


def test_lengths_that_the_model_does_not_take_are_refused(mixing, tmp_path):
    for length in (1, CHARACTERS + 1):
        np.savez(tmp_path / "data.npz", tokens=np.zeros((24, length), np.int64))
        with pytest.raises(SamplesError, match=f"seq of 2 to {CHARACTERS}"):
            verify_model(mixing / "out", tmp_path / "data.npz")


@pytest.mark.slow
def test_small_plans_are_rated_at_every_length(mixing, tmp_path):
    np.savez(tmp_path / "data.npz", tokens=np.load(mixing / "tokens.npy")[:, :7])
    verification = verify_model(mixing / "out", tmp_path / "data.npz")
    assert verification.note == ""
    assert verification.fidelity.sites.keys() == {"blocks.0", "blocks.1"}
    assert all(0 < rating.plan_tv < 0.1 for rating in verification.fidelity.sites.values())
    assert verification.outside["blocks.0"].plans == 24 * 7


def test_the_teacher_may_have_moved_and_may_not_be_another(compiled, tmp_path):
    moved = tmp_path / "moved.pt"
    shutil.copy(compiled / "model.pt", moved)
    assert verify_model(compiled / "out", compiled / "same.npz", moved).fidelity.samples == 8
    other = write_checkpoint(tmp_path / "other.pt", iterations=5)
    with pytest.raises(CheckpointError, match="not the model"):
        verify_model(compiled / "out", compiled / "same.npz", other)


@pytest.mark.parametrize("name", ["model.onnx", "report.json", "manifest.json", "operator.safetensors"])
def test_a_folder_that_changed_or_lacks_a_file_is_refused(compiled, name, tmp_path):
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"{}")):
        folder = tmp_path / "copy"
        shutil.copytree(compiled / "out", folder, dirs_exist_ok=True)
        damage(folder / name)
        with pytest.raises(CheckpointError) as caught:
            verify_model(folder, compiled / "same.npz", compiled / "model.pt")
        assert "compile" in caught.value.hint


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"pictures": np.zeros((3, 4, 4), np.float32)}, "the samples hold pictures"),
        ({"images": np.zeros((3, 4, 5), np.float32)}, "takes (batch, 4, 4) torch.float32"),
        ({"images": np.zeros((3, 4), np.float32)}, "takes (batch, 4, 4) torch.float32"),
        ({"images": np.zeros((3, 4, 4), np.int64)}, "images is (3, 4, 4) torch.int64"),
    ],
)
def test_samples_that_do_not_fit_are_refused(compiled, tmp_path, arrays, reason):
    data, outputs = tmp_path / "wrong.npz", tmp_path / "outputs.npz"
    np.savez(data, **arrays)
    np.savez(outputs, logits=np.zeros((3, 10), np.float32))
    with pytest.raises(SamplesError) as caught:
        verify_model(compiled / "out", data)
    assert reason in str(caught.value)
    with pytest.raises(SamplesError):
        verify_outputs(compiled / "out", data, outputs)


def test_the_command_prints_the_sites_and_exits_by_the_budget(compiled):
    arguments = ("verify", compiled / "out", "--data", compiled / "same.npz")
    result = run(*arguments)  # the budget is what the model was compiled to keep
    assert result.exit_code == 0, result.output
    assert "blocks.0.attention" in result.stdout
    assert "agreement" in result.stdout
    assert run(*arguments, "--fidelity", "relc<=1e-9").exit_code == 3
    data = json.loads(run(*arguments, "--json").stdout)
    assert data["schema"] == "asapc.verify/1"
    assert data["sites"][0]["outside_calibration"] <= 1
    assert_user_error(run("verify", compiled / "nothing", "--data", compiled / "same.npz"))
