"""Reads weights from a folder as Hugging Face's libraries write it: one file, or shards with an index."""

import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from asapc.errors import CheckpointError
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_safetensors, read_torch
from asapc.loading.untrusted.texts import read_json

# In the order in which transformers and diffusers look for them.
NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# What tells a folder of distributed training, and the command of its library that makes one file of it.
CONVERTED = {
    "zero_to_fp32.py": ("DeepSpeed", "python {0}/zero_to_fp32.py {0} weights --safe_serialization"),
    "pytorch_model_fsdp_*/.metadata": ("accelerate's FSDP", "accelerate merge-weights {0} weights"),
    ".metadata": (
        "torch.distributed.checkpoint",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {0} weights.pt",
    ),
}
INDEX = ".index.json"  # behind the name of the one file that the shards stand for
OWN = "manifest.json"  # of a compiled folder


@dataclass(frozen=True)
class Folder(Source):
    """A folder of files that make up one model.

    Attributes:
        files: the files with its weights, in the order of their names; an index of shards is the first.
    """

    files: tuple[Source, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the hashes of its files with weights, in their order."""
        return sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


def is_hub(path: Path) -> bool:
    """Return whether a path is a folder, or an index of shards in one."""
    return os.path.isdir(path) or path.name.endswith(INDEX)


def read_hub(path: Path) -> tuple[Folder, dict[str, Any]]:
    """Read the weights of a folder, or those that an index lists.

    Raises:
        CheckpointError: the folder holds no weights under the usual names, a file of them is missing or cannot be read,
            or the index does not fit its shards.
    """
    index = path if path.name.endswith(INDEX) else find_weights(path)
    if not index.name.endswith(INDEX):
        file = Source.at(index, CheckpointError)
        return Folder(path, CheckpointError, str(path), file.size, (file,)), read_file(file)
    source = Source.at(index, CheckpointError)
    places = weight_map(source)
    shards = {name: Source.at(index.parent / name, CheckpointError) for name in sorted(set(places.values()))}
    weights: dict[str, Any] = {}
    for name, shard in shards.items():
        content = read_file(shard)
        keys = [key for key, place in places.items() if place == name]
        for key in keys:
            if key not in content:
                raise shard.refuse(f"it lacks {key[:200]}, which {index.name} says it holds")
        weights |= {key: content[key] for key in keys}
    size = sum(shard.size for shard in shards.values())
    return Folder(path, CheckpointError, str(path), size, (source, *shards.values())), weights


def find_weights(folder: Path) -> Path:
    """Return the file of a folder that holds its weights, or the index of its shards."""
    if (folder / OWN).exists():
        raise CheckpointError(
            f"{folder} is a compiled folder", "give the checkpoint; `asapc verify` checks what is compiled"
        )
    for name in NAMES:
        for file in (folder / name, folder / f"{name}{INDEX}"):
            if file.exists():
                return file
    for mark, (kind, command) in CONVERTED.items():
        if part := next(iter(sorted(folder.glob(mark))), None):
            place = shlex.quote(str(part.parent))
            raise CheckpointError(
                f"{folder} is a checkpoint of {kind}, in parts that no single file lists",
                f"convert it, and give the result: {command.format(place)}",
            )
    raise CheckpointError(
        f"{folder} is a folder without weights under the usual names ({', '.join(NAMES)})",
        "give the file with the weights",
    )


def weight_map(source: Source) -> dict[str, str]:
    """Return the file of each weight as an index lists them; files lie beside it."""
    content = read_json(source)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise source.refuse("it is no index of shards: it has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise source.refuse(f"it names {str(name)[:80]!r}, which is no file beside it")
    return places


def read_file(source: Source) -> dict[str, Any]:
    """Read the weights of one file."""
    is_safe = source.path.suffix == ".safetensors"
    content = read_safetensors(source) if is_safe else read_torch(source)
    if not isinstance(content, dict):
        raise source.refuse("it holds no weights by name")
    return content
