"""Damages files at random."""

import io
import json
import pickle
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


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Replace one entry of JSON."""
    return json.dumps(change_json(json.loads(data), rng)).encode()


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


def second_directory(data: bytes) -> bytes:
    """An archive whose record at the end leads to one directory, and whose locator of large archives to another."""
    other = archive({"whole/data.pkl": pickle.dumps({"other": 1})})
    start, end = len(data), len(data) + len(other) - 22
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, end - start - 60, start + 60)
    return data[:-22] + other[:-22] + record + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1) + data[-22:]


def last_header(data: bytes) -> int:
    """Where the header of an archive's last member begins."""
    return data.rindex(b"PK\x03\x04")


def other_sizes(data: bytes) -> bytes:
    """An archive of which one header claims another size than the directory."""
    at = last_header(data) + 18
    return data[:at] + struct.pack("<L", 7) + data[at + 4 :]


def second_field(data: bytes) -> bytes:
    """An archive of which the last member's header has a field for large sizes once more, with other sizes."""
    at, field = last_header(data), struct.pack("<2H2Q", 1, 16, 7, 7)
    name, extra = struct.unpack("<2H", data[at + 26 : at + 30])
    behind, start = at + 30 + name + extra, int.from_bytes(data[-6:-2], "little") + 2 * len(field)
    header = data[at : at + 28] + struct.pack("<H", extra + 2 * len(field)) + data[at + 30 : behind]
    return data[:at] + header + 2 * field + data[behind:-6] + struct.pack("<LH", start, 0)


def other_name(data: bytes) -> bytes:
    """An archive of which one header has another name than the directory."""
    at = last_header(data) + 30
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def gap(data: bytes) -> bytes:
    """An archive with bytes between its members and its directory."""
    start = int.from_bytes(data[-6:-2], "little")
    return data[:start] + b"between" + data[start:-6] + struct.pack("<LH", start + 7, 0)


# Archives that two readers could read in two ways.
AMBIGUOUS: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: data + b"after",
    lambda data: data[:-2] + b"\x05\x00after",
    lambda data: b"PK\x03\x04before" + data,
    lambda data: data + data,
    lambda data: data[:-22] + data[-22:] * 2,
    lambda data: data[:-12] + bytes([data[-12] ^ 1]) + data[-11:],
    gap,
    second_directory,
    second_field,
    other_sizes,
    other_name,
)


def survive(path: Path, data: bytes, read: Callable[[Path], object]) -> bool:
    """Whether a file is read; if not, it was refused as it should be."""
    path.write_bytes(data)
    try:
        read(path)
        return True
    except AsapcError as error:
        assert_in_one_line(error)
    return False


def assert_in_one_line(refusal: AsapcError) -> None:
    """The command ends with 1, and says what is wrong and what to do, a line each."""
    assert refusal.exit_code == 1
    assert str(refusal).isprintable()
    assert 0 < len(str(refusal)) < 2000
    assert refusal.hint.isprintable()
    assert refusal.hint
