"""Thousands of damaged files: each is read, or refused in one line. The process survives, and soon."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Tiny, export
from safetensors.torch import save_file

from asapc.config import CompileConfig
from asapc.errors import AsapcError
from asapc.loading import load_model
from asapc.samples import load_samples

TINY = CompileConfig(model="hostile:Tiny")
VIT = {"size": 2, "classes": 2, "width": 4, "depth": 1, "heads": 1, "epsilon": 0.5, "iterations": 2}
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".pt2", ".onnx", ".npz", "")
NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63, 2**64, 10**30)


def checkpoint() -> dict:
    from asapc.models.vit import VisionTransformer

    return {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.vit:VisionTransformer",
        "model_args": VIT,
        "state_dict": VisionTransformer(**VIT).state_dict(),
        "held_out": {"inputs": {"images": torch.rand(2, 2, 2)}, "labels": torch.arange(2)},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Good files by kind."""
    folder = tmp_path_factory.mktemp("whole")
    torch.save(checkpoint(), folder / "checkpoint.pt")
    torch.save({"epoch": 3, "model": Tiny().state_dict()}, folder / "weights.pt")
    torch.save(Tiny().state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(Tiny().state_dict(), folder / "weights.safetensors")
    np.savez(folder / "arrays.npz", x=np.zeros((3, 4), dtype=np.float32), labels=np.arange(3))
    np.savez_compressed(folder / "packed.npz", x=np.zeros((3, 4), dtype=np.float32), labels=np.arange(3))
    torch.save({"x": torch.zeros(3, 4), "labels": torch.arange(3)}, folder / "samples.pt")
    export(folder / "program.pt2")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    number = struct.pack("<q", max(-(2**63), min(2**63 - 1, rng.choice(NUMBERS))))[: rng.choice((1, 2, 4, 8))]
    at = rng.randrange(len(data))
    return data[:at] + number + data[at + len(number) :]


def splice(data: bytes, rng: random.Random) -> bytes:
    first, second = rng.randrange(len(data)), rng.randrange(len(data))
    return data[:first] + data[second : second + rng.randrange(200)] + data[first + rng.randrange(20) :]


DAMAGE = (flip_bits, truncate, overwrite, splice)


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)
    return buffer.getvalue()


def damage_member(data: bytes, rng: random.Random) -> bytes:
    """Damage inside an archive that is whole itself, mostly in what describes the tensors."""
    contents = members(data)
    described = [name for name in contents if name.endswith((".pkl", ".json", ".npy", "/model.pt"))]
    name = rng.choice(described or list(contents))
    contents[name] = rng.choice(DAMAGE)(contents[name] or b"x", rng)
    return archive(contents)


def swap_members(data: bytes, rng: random.Random) -> bytes:
    contents = members(data)
    first, second = rng.choice(list(contents)), rng.choice(list(contents))
    contents[first], contents[second] = contents[second], contents[first]
    if rng.random() < 0.3:
        del contents[first]
    return archive(contents)


def change_json(value: object, rng: random.Random) -> object:
    """Replace one entry somewhere below by a number, a text, or a copy of another."""
    if isinstance(value, dict | list) and value and rng.random() < 0.97:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value[key] = change_json(value[key], rng)
        if isinstance(value, dict) and rng.random() < 0.02:
            del value[key]
        return value
    return rng.choice((*NUMBERS, "", "x", "x=1", "s0", None, True, 0.5, [], {}, [value], {"as_int": 2**40}))


def damage_graph(data: bytes, rng: random.Random) -> bytes:
    contents = members(data)
    name = rng.choice([name for name in contents if name.endswith(".json")])
    graph = json.loads(contents[name])
    for _ in range(rng.choice((1, 1, 3))):
        graph = change_json(graph, rng)
    return archive({**contents, name: json.dumps(graph).encode()})


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """Another number, name or structure in the header of a file of safetensors."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(change_json(json.loads(data[8 : 8 + length]), rng)).encode()
    claimed = len(header) if rng.random() < 0.8 else abs(rng.choice(NUMBERS)) % 2**64
    return struct.pack("<Q", claimed) + header + data[8 + length :]


def survive(path: Path, data: bytes, read: Callable[[Path], object]) -> bool:
    """Whether a file is read; if not, it was refused as it should be."""
    path.write_bytes(data)
    try:
        read(path)
        return True
    except AsapcError as error:
        refusal = error
    assert str(refusal).isprintable()
    assert len(str(refusal)) < 2000
    assert refusal.hint.isprintable()
    return False


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
        ("program.pt2", load_model, (*DAMAGE, damage_member, damage_graph, damage_graph, swap_members), 150),
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
