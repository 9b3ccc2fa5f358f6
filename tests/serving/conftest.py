"""Compiled folders to package."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.quick import quick_compilation
from helpers.zoo.masks import KeysMinusInfinity, padded

import asapc


@pytest.fixture(scope="session")
def folder(point_model) -> Path:
    """A small model on sets of points, compiled for 8 to 48 of them and batches of up to 16."""
    _, compile_it = point_model
    return compile_it(dynamic="batch=1:16,seq=8:48", target="onnx").folder


class MaskedOrNot(KeysMinusInfinity):
    """A model that may do without its mask."""

    def forward(self, x, mask=None):
        return super().forward(x, torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask)


@pytest.fixture(scope="session")
def masked(tmp_path_factory) -> Callable[[tuple[str, ...]], Path]:
    """A function that compiles a model of tokens, and of a mask where that is among the inputs that it names."""

    @cache
    def compile_it(given: tuple[str, ...]) -> Path:
        torch.manual_seed(0)
        inputs = padded(32, torch.Generator().manual_seed(0))
        samples = {name: inputs[name] for name in given}
        options = {"level": 1, "batches": (1,), "seconds": 0.1, "threads": 1, "target": "onnx"}
        with quick_compilation():
            return asapc.compile(
                MaskedOrNot(6).eval(), samples, out=tmp_path_factory.mktemp("masked") / "out", **options
            ).folder

    return compile_it
