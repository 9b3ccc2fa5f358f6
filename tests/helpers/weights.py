"""Weights in files, and the options with which the model that tests read takes them."""

from pathlib import Path

import torch
from helpers.hostile import Tiny

from asapc.config import CompileConfig

TINY = CompileConfig(model="helpers.hostile:Tiny")


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def weights() -> dict[str, torch.Tensor]:
    return Tiny().state_dict()


def same(loaded, expected: dict[str, torch.Tensor]) -> bool:
    result = loaded.module.state_dict()
    return result.keys() == expected.keys() and all(torch.equal(result[k], expected[k]) for k in result)
