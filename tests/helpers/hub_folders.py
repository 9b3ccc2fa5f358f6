"""Folders as Hugging Face's libraries write them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from .hostile import Tiny

WRITERS = {"safetensors": save_file, "bin": torch.save}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return Tiny().state_dict()


def sharded(folder: Path, suffix: str = "safetensors", stem: str = "model") -> Path:
    """Two shards and their index; a config beside them, as always."""
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Tiny"]}')
    parts = {}
    for number, (key, value) in enumerate(weights().items()):
        parts.setdefault(f"{stem}-0000{number % 2 + 1}-of-00002.{suffix}", {})[key] = value.contiguous()
    for name, part in parts.items():
        WRITERS[suffix](part, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.{suffix}.index.json"


def described(folder: Path) -> Path:
    """A model as `save_pretrained` writes it: its output weights are tied to the embeddings, and not saved again."""
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
    return folder
