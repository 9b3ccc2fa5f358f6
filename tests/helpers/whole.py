"""A good file of each kind that asapc reads, small enough to be damaged thousands of times."""

from pathlib import Path

import numpy as np
import torch
from helpers.hostile import Tiny, export
from safetensors.torch import save_file

from asapc.models.vit import VisionTransformer

VIT = {"size": 2, "classes": 2, "width": 4, "depth": 1, "heads": 1, "epsilon": 0.5, "iterations": 2}


def checkpoint() -> dict:
    return {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.vit:VisionTransformer",
        "model_args": VIT,
        "state_dict": VisionTransformer(**VIT).state_dict(),
        "held_out": {"inputs": {"images": torch.rand(2, 2, 2)}, "labels": torch.arange(2)},
    }


def whole_files(folder: Path) -> dict[str, bytes]:
    """Write good files into a folder, and return them by name."""
    torch.save(checkpoint(), folder / "checkpoint.pt")
    torch.save({"epoch": 3, "model": Tiny().state_dict()}, folder / "weights.pt")
    torch.save(Tiny().state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(Tiny().state_dict(), folder / "weights.safetensors")
    np.savez(folder / "arrays.npz", x=np.zeros((3, 4), dtype=np.float32), labels=np.arange(3))
    np.savez_compressed(folder / "packed.npz", x=np.zeros((3, 4), dtype=np.float32), labels=np.arange(3))
    torch.save({"x": torch.zeros(3, 4), "labels": torch.arange(3)}, folder / "samples.pt")
    export(folder / "program.pt2")
    return {path.name: path.read_bytes() for path in folder.iterdir()}
