"""The model of a folder is built again as its report says, if that is the user's own, and recognised by its weights."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.hostile import Tiny, export, forget
from safetensors.torch import save_file

from asapc.config import CompileConfig
from asapc.errors import CheckpointError
from asapc.loading.model import load_model
from asapc.loading.teacher import is_own, load_teacher, model_data, weights_sha256

CODE = "from helpers.hostile import Tiny\ndef build(width=4, name=''):\n    return Tiny(width)\n"
OPTIONS = {"model": "own_model:build", "model_args": {"name": "it's"}}


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """A model in the working directory, and what a report says of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own_model.py").write_text(CODE)
    torch.save(Tiny().state_dict(), "weights.pt")
    config = CompileConfig(**OPTIONS)
    yield model_data(load_model("weights.pt", config), config)
    forget("own_model")


def test_a_model_is_built_again_as_its_report_says(facts):
    loaded = load_teacher(Path("out"), {"model": facts}, None, CompileConfig())
    assert loaded.sha256 == facts["sha256"]
    assert facts["rebuild"] == {**OPTIONS, "weights": None}
    assert is_own(facts)


def test_code_that_somebody_elses_folder_names_is_not_run(facts, monkeypatch, tmp_path):
    changed = facts | {"rebuild": facts["rebuild"] | {"model": "os:mkdir", "model_args": {"path": "taken"}}}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "somebody"))
    for foreign in (changed, facts, facts | {"signature": None}, facts | {"signature": "0" * 64}):
        with pytest.raises(CheckpointError, match="was not compiled here") as caught:
            load_teacher(Path("out"), {"model": foreign}, None, CompileConfig())
    assert not Path("taken").exists()
    assert not (tmp_path / "somebody").exists()  # a folder that is only read makes no key
    assert caught.value.hint == (
        """if you trust that code, add --model own_model:build --model-args '{"name": "it'"'"'s"}'"""
    )
    # Told by the user, it is built.
    assert load_teacher(Path("out"), {"model": facts}, None, CompileConfig(**OPTIONS)).parameters


def test_where_no_key_can_be_kept_nothing_is_signed_and_the_user_says_how(facts, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    config = CompileConfig(**OPTIONS)
    assert model_data(load_model("weights.pt", config), config)["signature"] is None
    assert not is_own(facts)


def test_a_key_is_the_users_alone(facts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "new"))
    config = CompileConfig(**OPTIONS)
    first, second = (model_data(load_model("weights.pt", config), config) for _ in range(2))
    assert first == second
    assert first["signature"] != facts["signature"]
    assert (tmp_path / "new" / "asapc" / "key").stat().st_mode & 0o777 == 0o600


def test_weights_that_were_saved_anew_are_recognised_and_others_are_not(facts):
    weights = torch.load("weights.pt", weights_only=True)
    save_file(weights, "anew.safetensors")
    loaded = load_teacher(Path("out"), {"model": facts}, Path("anew.safetensors"), CompileConfig())
    assert loaded.sha256 != facts["sha256"]
    one = next(iter(weights))
    save_file(weights | {one: weights[one] + 1e-6}, "others.safetensors")
    with pytest.raises(CheckpointError, match="is not the model"):
        load_teacher(Path("out"), {"model": facts}, Path("others.safetensors"), CompileConfig())
    # Equal weights in another model are another model.
    other = CompileConfig(**OPTIONS | {"model_args": {"name": "another"}})
    with pytest.raises(CheckpointError, match="is not the model"):
        load_teacher(Path("out"), {"model": facts}, Path("anew.safetensors"), other)


def test_a_file_that_holds_its_own_graph_has_no_hash_of_weights(tmp_path):
    loaded = load_model(export(tmp_path / "program.pt2"))
    assert weights_sha256(loaded) is None
    data = model_data(loaded, CompileConfig())
    assert (data["rebuild"], data["signature"]) == (None, None)


def test_arguments_that_json_does_not_hold_are_not_kept(facts):
    config = CompileConfig(model="own_model:build", model_args={"name": ("a", "tuple")})
    assert model_data(load_model("weights.pt", config), config)["rebuild"] is None


def test_a_model_that_is_not_there_is_said_to_be_elsewhere(facts):
    Path("weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is not at weights\.pt"):
        load_teacher(Path("out"), {"model": facts}, None, CompileConfig())
