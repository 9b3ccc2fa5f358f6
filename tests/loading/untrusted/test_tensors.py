"""Files of safetensors whose headers do not fit them."""

import json
import struct
from pathlib import Path

import pytest
import torch
from helpers.hostile import assert_refused
from safetensors.torch import save_file

from asapc.errors import CheckpointError
from asapc.loading.model import load_model


def safetensors(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (entry(0, 2**40, [2**38]), None),
        (entry(0, 16, [2**62, 4]), None),
        (entry(0, 16, [5]), None),
        (entry(8, 4, [1]), None),
        (entry(0, 16, [-4]), None),
        (entry(0, 16, [4], "F99"), None),
        (entry(0, 16, [4]), 2**63),
        (entry(0, 16, [4]), 2**31),
        (entry(0, 16, [4]), 0),
        ([], None),
        (b"[" * 100_000, None),
        (b'{"a":' * 100_000, None),
        (b"\xff\xfe", None),
    ],
)
def test_headers_of_safetensors_that_do_not_fit_the_file_are_refused(header, length, tmp_path):
    path = safetensors(tmp_path / "w.safetensors", header, bytes(16), length)
    assert_refused(CheckpointError, load_model, path)


def test_a_good_file_of_safetensors_is_asked_for_its_model(tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "w.safetensors")
    assert "model" in assert_refused(CheckpointError, load_model, tmp_path / "w.safetensors")
