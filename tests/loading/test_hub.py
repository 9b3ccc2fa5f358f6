"""Folders of weights as Hugging Face's libraries write them."""

import json
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint
from helpers.hostile import Tiny, assert_refused, hint_of
from helpers.hub_folders import WRITERS, sharded, weights
from safetensors.torch import save_file

from asapc.config import CompileConfig
from asapc.errors import CheckpointError
from asapc.loading.model import load_model

TINY = CompileConfig(model="helpers.hostile:Tiny")
STEMS = {"safetensors": ("model", "diffusion_pytorch_model"), "bin": ("pytorch_model", "diffusion_pytorch_model")}
LAYOUTS = [(suffix, stem) for suffix, stems in STEMS.items() for stem in stems]


def same(loaded) -> bool:
    return all(torch.equal(value, loaded.module.state_dict()[key]) for key, value in weights().items())


@pytest.mark.parametrize(("suffix", "stem"), LAYOUTS)
def test_one_file_or_shards_are_read(suffix, stem, tmp_path):
    index = sharded(tmp_path / "shards", suffix, stem)
    (tmp_path / "whole").mkdir()
    WRITERS[suffix](weights(), tmp_path / "whole" / f"{stem}.{suffix}")
    for path in (tmp_path / "shards", index, tmp_path / "whole"):
        assert same(load_model(path, TINY)), path


def test_shards_may_be_links_as_hubs_keep_them(tmp_path):
    sharded(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for file in list((tmp_path / "snapshot").iterdir()):
        blob = tmp_path / "blobs" / file.name.encode().hex()
        shutil.move(file, blob)
        file.symlink_to(blob)
    assert same(load_model(tmp_path / "snapshot", TINY))


def test_the_hash_is_that_of_all_files(tmp_path):
    index = sharded(tmp_path / "shards")
    before = load_model(tmp_path / "shards", TINY).sha256
    assert load_model(index, TINY).sha256 == before
    save_file({**weights(), "more": torch.zeros(1)}, tmp_path / "shards" / "model-00001-of-00002.safetensors")
    assert load_model(index, TINY).sha256 != before


def test_a_folder_without_a_model_to_build_says_what_to_give(tmp_path):
    sharded(tmp_path / "shards")
    message = assert_refused(CheckpointError, load_model, tmp_path / "shards")
    assert "does not say which model" in message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda index: index.update(weight_map=None), "weight_map"),
        (lambda index: index.update(weight_map={}), "weight_map"),
        (lambda index: index["weight_map"].update({"more": "model-00001-of-00002.safetensors"}), "lacks more"),
        (lambda index: index["weight_map"].update({"more": "absent.safetensors"}), "no such file"),
        (lambda index: index["weight_map"].update({"more": "../model.safetensors"}), "no file beside it"),
        (lambda index: index["weight_map"].update({"more": "/etc/passwd"}), "no file beside it"),
        (lambda index: index["weight_map"].update({"more": 3}), "no file beside it"),
        (lambda index: index["weight_map"].pop(next(iter(index["weight_map"]))), "lacks"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(change, word, tmp_path):
    path = sharded(tmp_path / "shards")
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert word in assert_refused(CheckpointError, lambda path: load_model(path, TINY), path.parent)


def test_folders_of_other_kinds_are_refused(tmp_path):
    assert "without weights" in assert_refused(CheckpointError, load_model, tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert "compiled folder" in assert_refused(CheckpointError, load_model, tmp_path)


@pytest.mark.slow
def test_parts_of_distributed_training_are_converted_by_the_command_in_the_hint(tmp_path):
    expected = Tiny().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        torch.distributed.checkpoint.save({"model": expected}, checkpoint_id=tmp_path / "parts of it")
    hint = hint_of(lambda path: load_model(path, TINY), tmp_path / "parts of it")
    command = shlex.split(hint.partition(": ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    state = load_model(tmp_path / "weights.pt", TINY).module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("name", "word"), [("zero_to_fp32.py", "DeepSpeed"), ("pytorch_model_fsdp_0/.metadata", "accelerate merge-weights")]
)
def test_folders_of_other_trainers_are_named_with_their_command(name, word, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path, TINY)
    assert word in f"{caught.value} {caught.value.hint}"
