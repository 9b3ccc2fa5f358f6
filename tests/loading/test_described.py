"""Folders whose config.json names a model of transformers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.hostile import assert_refused
from helpers.hub_folders import described
from transformers import BertForMaskedLM

from asapc.errors import CheckpointError, DependencyError, OptionError
from asapc.loading.model import load_model


@pytest.fixture
def folder(tmp_path):
    return described(tmp_path / "bert")


def change(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_model_is_built_and_has_the_weights_that_transformers_gives_it(folder):
    ids = torch.randint(40, (2, 7))
    loaded = load_model(folder).module
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, BertForMaskedLM.from_pretrained(folder).eval()(ids).logits)


def test_code_that_the_folder_names_is_never_run(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    change(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}, trust_remote_code=True)
    change(folder, attn_implementation="somebody/kernels")
    load_model(folder)
    assert not (folder / "ran").exists()


def test_a_class_that_transformers_lacks_is_named(folder):
    for name in ("BertForEverything", "os", "BertConfig", "../evil", 3):
        change(folder, architectures=[name])
        assert str(name) in assert_refused(OptionError, load_model, folder)


def test_a_model_far_larger_than_its_weights_is_not_built(folder):
    change(folder, vocab_size=10**9)
    assert "34,000,010,256 numbers" in assert_refused(CheckpointError, load_model, folder)


@pytest.mark.parametrize("setting", ["num_hidden_layers", "num_labels"])
@pytest.mark.parametrize("count", [2**16, 2**40])
def test_a_model_of_far_more_layers_or_labels_than_any_is_refused_at_once(setting, count, folder):
    change(folder, architectures=["BertForTokenClassification"], **{setting: count})
    assert_refused(CheckpointError, load_model, folder)


def test_tables_that_a_model_does_not_save_take_no_more_memory_than_its_weights_warrant(folder):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "rotary_dim": 8}
    change(folder, architectures=["GPTJForCausalLM"], model_type="gptj", max_position_embeddings=2**40, **sizes)
    assert "8,796,093,022,208 numbers" in assert_refused(CheckpointError, load_model, folder)


def test_what_transformers_would_print_is_not_printed(folder, caplog, capfd):
    change(folder, bos_token_id=2**20)
    load_model(folder)
    assert (*caplog.records, *capfd.readouterr()) == ("", "")


def test_settings_that_transformers_refuses_are_told(folder):
    change(folder, num_attention_heads=5)
    assert "transformers cannot build BertForMaskedLM: ValueError" in assert_refused(
        CheckpointError, load_model, folder
    )


def test_weights_of_another_size_are_refused_as_with_a_model_of_ones_own(folder):
    change(folder, intermediate_size=24)
    assert "BertForMaskedLM" in assert_refused(CheckpointError, load_model, folder)


def test_nothing_is_fetched_to_build_a_model(folder):
    backbone = {"backbone": "somebody/backbone", "use_pretrained_backbone": True, "use_timm_backbone": False}
    change(folder, architectures=["DetrForObjectDetection"], model_type="detr", backbone_config=None, **backbone)
    assert "transformers cannot build" in assert_refused(CheckpointError, load_model, folder)


def test_without_transformers_it_is_said_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = assert_refused(DependencyError, load_model, folder)
    assert "transformers" in message


def test_what_describes_no_model_of_transformers_needs_one_to_be_named(folder):
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "does not say which model" in assert_refused(CheckpointError, load_model, folder)
