"""Thousands of damaged files: each is read, or refused in one line. The process survives, and soon."""

import random
import struct
from pathlib import Path

import pytest
from helpers.damage import DAMAGE, damage_graph, damage_header, damage_member, survive, swap_members
from helpers.whole import whole_files

from asapc.config import CompileConfig
from asapc.loading.model import load_model
from asapc.loading.samples import load_samples

TINY = CompileConfig(model="helpers.hostile:Tiny")
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".pt2", ".onnx", ".npz", "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    return whole_files(tmp_path_factory.mktemp("whole"))


def read_weights(path: Path) -> object:
    return load_model(path, TINY)


@pytest.mark.parametrize(
    ("name", "read", "makers", "count"),
    [
        ("checkpoint.pt", load_model, (*DAMAGE, damage_member, damage_member, swap_members), 450),
        ("weights.pt", read_weights, (*DAMAGE, damage_member, damage_member, swap_members), 450),
        ("legacy.pt", read_weights, DAMAGE, 450),
        ("weights.safetensors", read_weights, (*DAMAGE, damage_header, damage_header), 400),
        ("arrays.npz", load_samples, (*DAMAGE, damage_member, swap_members), 300),
        ("packed.npz", load_samples, (*DAMAGE, damage_member, swap_members), 200),
        ("samples.pt", load_samples, (*DAMAGE, damage_member, damage_member, swap_members), 300),
        ("program.pt2", load_model, (*DAMAGE, damage_member, damage_graph, damage_graph, swap_members), 60),
    ],
)
def test_a_damaged_file_is_read_or_refused(name, read, makers, count, whole, tmp_path):
    rng = random.Random(name)
    path = tmp_path / name
    refused = sum(not survive(path, rng.choice(makers)(whole[name], rng), read) for _ in range(count))
    assert 0 < refused <= count
    assert survive(path, whole[name], read)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_noise_is_refused_under_any_suffix(suffix, tmp_path):
    rng = random.Random(suffix)
    starts = (
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x05",
        b"\x08\x07",
        struct.pack("<Q", 20) + b"{",
        b"\x93NUMPY\x01\x00",
    )
    for _ in range(40):
        data = rng.choice(starts) + rng.randbytes(rng.choice((0, 1, 7, 100, 5000)))
        for read in (load_model, read_weights, load_samples):
            assert not survive(tmp_path / f"noise{suffix}", data, read)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_under_the_suffix_of_another_is_read_or_refused(suffix, whole, tmp_path):
    for data in whole.values():
        for read in (load_model, read_weights, load_samples):
            survive(tmp_path / f"other{suffix}", data, read)
