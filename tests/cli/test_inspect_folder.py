"""`asapc inspect` of what `asapc compile` wrote: sites, files, and the layers of the engine."""

import json

import pytest
import torch
from helpers.command import QUICK, assert_user_error, run, write_checkpoint
from helpers.quick import quick_compilation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    place = tmp_path_factory.mktemp("compiled")
    with quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        options = ("--target", "tensorrt-rtx", "--profile", "images=1x4x4:1x4x4:3x4x4")
        done = run("compile", write_checkpoint(place / "m.pt"), "--out", place / "m.asap", *options, *QUICK)
    assert done.exit_code == 0, done.stderr
    assert "NVIDIA's compiler ..." in done.stderr
    return place / "m.asap"


def test_the_layers_of_the_engine_are_shown_with_their_sites(folder):
    done = run("inspect", folder)
    assert done.exit_code == 0, done.stderr
    assert "model.engine" in done.stdout
    assert "blocks.0.attention is in " in done.stdout
    report = json.loads(run("inspect", folder, "--json").stdout)
    assert report == json.loads((folder / "report.json").read_text())
    layers = report["engine"]["layers"]
    assert any("blocks.0.attention" in layer["sites"] for layer in layers)
    assert any(layer["modules"] == ["head"] and not layer["sites"] for layer in layers)


def test_a_folder_that_was_changed_is_refused(folder):
    engine = folder / "model.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1])
    try:
        assert_user_error(run("inspect", folder))
    finally:
        engine.write_bytes(content)
