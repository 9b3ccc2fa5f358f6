"""Every kind of file that people have a model in, as small as can be, and what asapc says of it."""

import argparse
import os
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch.export import Dim, save

from asapc.config import OPTIONS, CompileConfig
from asapc.errors import AsapcError
from asapc.loading.model import load_model

from .hostile import Tiny
from .hub_folders import described, sharded
from .onnx_files import to_onnx

MODEL = "helpers.hostile:Tiny"  # in the document it is the reader's own
SHOWN = {MODEL: "my_model:build"}
X = {"x": torch.linspace(-1, 1, 24).reshape(2, 3, 4)}


@dataclass(frozen=True)
class Format:
    """A file, how it is written, and the options with which it is read."""

    name: str
    file: str
    write: Callable[[str], Any]
    options: dict[str, Any] = field(default_factory=lambda: {"model": MODEL})

    @property
    def arguments(self) -> list[str]:
        flags = ([OPTIONS[key].flag, *([] if value is True else [value])] for key, value in self.options.items())
        return ["inspect", self.file, *(word for words in flags for word in words)]

    @property
    def command(self) -> str:
        return " ".join(["asapc", *(SHOWN.get(word, word) for word in self.arguments)])

    def said(self) -> tuple[bool, str]:
        """Whether it is read, and the notes or the refusal with its hint."""
        with TemporaryDirectory() as folder, chdir(folder):
            self.write(self.file)
            try:
                loaded = load_model(self.file, CompileConfig(**self.options))
            except AsapcError as error:
                return False, f"{error}; {error.hint}"
            return True, "; ".join(loaded.notes)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(Tiny().state_dict())


def with_loss() -> dict[str, torch.Tensor]:
    return {f"model.{key}": value for key, value in weights().items()} | {"criterion.weight": torch.ones(2)}


def saved(content: Callable[[], Any], **options: Any) -> Callable[[str], Any]:
    return lambda file: torch.save(content(), file, **options)


def marked(name: str) -> Callable[[str], None]:
    """A folder that only this file tells."""

    def write(folder: str) -> None:
        os.mkdir(folder)
        (Path(folder) / name).touch()

    return write


def exported(file: str) -> None:
    save(torch.export.export(Tiny().eval(), tuple(X.values()), dynamic_shapes=({0: Dim.DYNAMIC},)), file)


def onnx_file(file: str) -> None:
    to_onnx(Path(file), Tiny().eval(), X)


def external(file: str) -> None:
    onnx_file(file)
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="model.data", size_threshold=0)


def fixed_batch(file: str) -> None:
    onnx_file(file)
    model = onnx.load(file)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, file)


NOTHING: dict[str, Any] = {}
FORMATS = [
    Format("state dict", "model.pt", saved(weights)),
    Format("state dict, older format of torch", "model.pth", saved(weights, _use_new_zipfile_serialization=False)),
    Format("state dict, pickle protocol 4", "model.bin", saved(weights, pickle_protocol=4)),
    Format("safetensors", "model.safetensors", lambda file: save_file(weights(), file)),
    Format(
        "training checkpoint, weights of a loss beside the model's",
        "epoch.ckpt",
        saved(lambda: {"epoch": 3, "state_dict": with_loss()}),
    ),
    Format(
        "checkpoint with numbers of numpy and a Namespace",
        "epoch.pt",
        saved(lambda: {"model": weights(), "best": np.float64(0.9), "args": argparse.Namespace(lr=1.0)}),
    ),
    Format(
        "checkpoint with averaged weights too",
        "averaged.pt",
        saved(lambda: {"model": weights(), "model_ema": weights(1)}),
    ),
    Format(
        "the same, with the place",
        "averaged.pt",
        saved(lambda: {"model": weights(), "model_ema": weights(1)}),
        {"model": MODEL, "weights": "model_ema"},
    ),
    Format("weights of another model", "other.pt", saved(lambda: {"other.weight": torch.ones(2)})),
    Format("adapter (LoRA)", "adapter.pt", saved(lambda: {"base_model.model.head.lora_A.weight": torch.ones(2, 4)})),
    Format("Hugging Face, shards", "folder", lambda file: sharded(Path(file))),
    Format("Hugging Face, transformers' own model", "bert", lambda file: described(Path(file)), NOTHING),
    Format("DeepSpeed", "parts", marked("zero_to_fp32.py")),
    Format("torch.distributed.checkpoint, FSDP", "parts", marked(".metadata")),
    Format("pickled module", "module.pt", saved(Tiny), NOTHING),
    Format("pickled module, trusted", "module.pt", saved(Tiny), {"unsafe_load": True}),
    Format("torch.export", "model.pt2", exported, NOTHING),
    Format("ONNX", "model.onnx", onnx_file, NOTHING),
    Format("ONNX, weights in another file", "model.onnx", external, NOTHING),
    Format("ONNX, batch fixed", "model.onnx", fixed_batch, NOTHING),
    Format("TorchScript", "script.pt", lambda file: torch.jit.save(torch.jit.trace(Tiny(), tuple(X.values())), file)),
    Format(
        "pointer of Git LFS",
        "model.pt",
        lambda file: Path(file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ),
    Format("TensorFlow, Keras", "model.h5", lambda file: Path(file).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))),
]


def table() -> list[str]:
    """The rows of docs/loading.md."""
    rows = ["| what | command | | what asapc says |", "|---|---|---|---|"]
    for format_ in FORMATS:
        read, text = format_.said()
        rows.append(f"| {format_.name} | `{format_.command}` | {'read' if read else 'refused'} | {text} |")
    return [row.replace(MODEL, SHOWN[MODEL]) for row in rows]
