"""Damages files at random."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from asapc.errors import AsapcError

NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63, 2**64, 10**30)


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
