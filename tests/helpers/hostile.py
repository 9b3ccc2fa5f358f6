"""Files that would run code or take memory, and the model that tests read; shared by the tests of loading."""

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from asapc.errors import AsapcError
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples

READERS = {".pt": load_samples, ".pth": load_model, ".bin": load_model}


class Tiny(nn.Module):
    """Attention with Sinkhorn, small enough to be exported hundreds of times; "mask" is not saved."""

    def __init__(self, width: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 2)
        self.register_buffer("mask", torch.zeros(3, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            scores = layer(x) @ x.transpose(1, 2) + self.mask
            for _ in range(2):
                scores = scores - scores.logsumexp(-1, keepdim=True)
                scores = scores - scores.logsumexp(-2, keepdim=True)
            x = x + scores.exp() @ x
        return self.head(x.mean(1))


class Bomb:
    """Creates a folder when it is unpickled by a reader that lets pickles call functions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def bomb_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


def bomb_torch_legacy(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


BOMB_FORMATS = {"pickle": bomb_pickle, "torch-legacy": bomb_torch_legacy, "torch-zip": lambda p, c: torch.save(c, p)}


def assert_refused(kind: type[AsapcError], read: Callable, path: object, named: str | None = None) -> str:
    """The reader raises `kind` with a one-line message that names the file or `named`, and a hint; the message."""
    with pytest.raises(kind) as caught:
        read(path)
    assert caught.value.hint.isprintable()
    message = str(caught.value)
    assert (str(path) if named is None else named) in message
    assert "\n" not in message
    return message


def hint_of(read: Callable, path: object) -> str:
    """The hint with which a reader refuses a path."""
    with pytest.raises(AsapcError) as caught:
        read(path)
    return caught.value.hint


def rezip(source: Path, target: Path, changes: dict[str, bytes | None] | Callable[[str, bytes], bytes]) -> Path:
    """Copy an archive of torch, with members replaced, added, or removed by None."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).split("/")[0]
    if callable(changes):
        members = {name: changes(name.partition("/")[2], content) for name, content in members.items()}
    else:
        members |= {f"{root}/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return target


def export(path: Path, module: nn.Module | None = None, batch: object = True, **options: object) -> Path:
    """Write a torch.export archive; `batch` is its batch axis, True for one of every size."""
    inputs = torch.rand(2, 3, 4)
    dim = Dim("batch") if batch is True else batch
    program = torch.export.export(
        module or Tiny().eval(), (inputs,), dynamic_shapes=({0: dim},) if dim else None, **options
    )
    torch.export.save(program, path)
    return path


def forget(module: str) -> None:
    """Forget a module that a test wrote, so that the next test may write another of its name."""
    sys.modules.pop(module, None)


def torch_file(folder: Path, name: str = "whole.pt") -> Path:
    torch.save({"x": torch.zeros(3, 4)}, folder / name)
    return folder / name
