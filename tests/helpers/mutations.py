"""Mutated files: damaged in their bytes, rearranged, or written anew with other entries or with a call in them."""

import argparse
import io
import pickletools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import safetensors.torch
import torch
from torch import Tensor, nn

from .damage import (
    AMBIGUOUS,
    DAMAGE,
    NUMBERS,
    archive,
    damage_graph,
    damage_header,
    damage_json,
    damage_member,
    members,
    swap_members,
)
from .formats import FORMATS, MODEL, NOTHING, Format, saved
from .hostile import Bomb
from .hub_folders import sharded
from .whole import checkpoint

Tree = dict[str, bytes]  # the files of one model, by their paths
Maker = Callable[[bytes, random.Random], bytes]

CANARY = Path("ran")  # a folder that the calls in mutated files create where they are read
CALL = b"cos\nmkdir\nX\x03\x00\x00\x00ranq\xfe\x85R0"  # of a pickle, which is the same but for it
NAMES = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_parameter\n")
DTYPES = (torch.half, torch.bfloat16, torch.double, torch.int32, torch.bool, torch.complex64)
KEYS = ("extra", "head.extra", "other.weight", "mask", "n_averaged", "layers.1.weight", "epoch", "")
PREFIXES = ("module.", "_orig_mod.", "net.model.", "head.")
FILES = ("model.safetensors", "pytorch_model.bin", "manifest.json", "other")  # that a folder may have besides
# A file that --unsafe-load runs may do whatever its bytes say.
READ = [format_ for format_ in FORMATS if "unsafe_load" not in format_.options] + [
    Format("checkpoint of asapc train", "trained.pt", saved(checkpoint), NOTHING),
    Format(
        "Hugging Face, shards of torch",
        "shards",
        lambda file: sharded(Path(file), "bin", "pytorch_model"),
        {"model": MODEL},
    ),
]


def whole(format_: Format) -> Tree:
    """The files of a format as its library writes them."""
    with TemporaryDirectory() as folder, chdir(folder):
        format_.write(format_.file)
        return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


def mutate(tree: Tree, rng: random.Random) -> Tree:
    """Change one file, or which files there are; now and then damage one beyond that."""
    if len(tree) > 1 and rng.random() < 0.25:
        tree = rearrange(tree, rng)
    else:
        tree = change_file(tree, rng, makers)
    return change_file(tree, rng, lambda *_: BYTES) if rng.random() < 0.1 else tree


def change_file(tree: Tree, rng: random.Random, ways: Callable[[str, bytes], tuple[Maker, ...]]) -> Tree:
    name = rng.choice(list(tree))
    data = tree[name] or b"x"
    return {**tree, name: rng.choice(ways(name, data))(data, rng)}


def rearrange(tree: Tree, rng: random.Random) -> Tree:
    """Exchange two files, drop one, or write one over another or beside them."""
    first, second = rng.sample(list(tree), 2)
    beside = str(Path(first).with_name(rng.choice(FILES)))
    changed = rng.choice(
        ({first: tree[second], second: tree[first]}, {first: tree[second]}, {beside: tree[first]}, {first: None})
    )
    return {name: data for name, data in {**tree, **changed}.items() if data is not None}


def makers(name: str, data: bytes) -> tuple[Maker, ...]:
    """Ways to change a file, by what it is; half of them and more leave it a file of its format."""
    match Path(name).suffix:
        case ".json":
            return (*BYTES, *[damage_json] * 6)
        case ".safetensors":
            return (*BYTES, *[damage_header] * 3, *[change_entries] * 6)
        case ".onnx":
            return (*BYTES, *[change_onnx] * 6)
        case ".pt2":
            return (*BYTES, damage_member, *[damage_graph] * 3, swap_members, ambiguous)
        case ".pt" | ".pth" | ".bin" | ".ckpt" if data.startswith(b"PK"):
            return (*BYTES, *TORCH, damage_member, swap_members, ambiguous)
        case ".pt" | ".pth" | ".bin" | ".ckpt" if data.startswith(b"\x80"):
            return (*BYTES, *TORCH)
    return BYTES


def blank(data: bytes, rng: random.Random) -> bytes:
    """Zero, remove or repeat a run of bytes."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 4, 64, 1024)))
    return data[:start] + rng.choice((bytes(end - start), b"", data[start:end] * 2)) + data[end:]


def ambiguous(data: bytes, rng: random.Random) -> bytes:
    """An archive that can be read in two ways."""
    return rng.choice(AMBIGUOUS)(data)


def change_opcodes(data: bytes, rng: random.Random) -> bytes:
    """Drop, repeat, replace or exchange opcodes of a pickle, change what one names, or let it call a function."""
    if data.startswith(b"PK"):
        contents = members(data)
        name = next((name for name in contents if name.endswith(".pkl")), next(iter(contents)))
        return archive({**contents, name: change_opcodes(contents[name], rng)})
    codes = list(opcodes(data))
    rest = data[sum(map(len, codes)) :]
    if len(codes) < 3:
        return blank(data, rng)
    at, other = rng.randrange(1, len(codes) - 1), rng.choice(codes)
    alike = rng.choice([code for code in codes if code[0] == codes[at][0]])  # often the same, with another argument
    named = rng.choice(NAMES) if codes[at].startswith(b"c") else CALL + codes[at]
    codes[at : at + 1] = rng.choice(([], [codes[at]] * 2, [other], [alike], [codes[at + 1], codes[at]], [named]))
    return b"".join(codes) + rest


def opcodes(data: bytes) -> Iterator[bytes]:
    """The opcodes of the pickles that a file begins with, each with its argument."""
    stream = io.BytesIO(data)
    while data[stream.tell() :].startswith(b"\x80"):
        positions = [position for *_, position in pickletools.genops(stream)]
        for start, end in zip(positions, [*positions[1:], stream.tell()], strict=True):
            yield data[start:end]


def change_entries(data: bytes, rng: random.Random) -> bytes:
    """Write a file of weights anew with an entry renamed, dropped, added, or of other shape, dtype or values."""
    if b"constants.pkl" in data:  # TorchScript, which holds no entries
        return change_opcodes(data, rng)
    is_torch = data[8:9] != b"{"
    # Only of files that tests wrote themselves.
    content = torch.load(io.BytesIO(data), weights_only=False) if is_torch else safetensors.torch.load(data)
    if not isinstance(content, dict):
        return blank(data, rng)
    changed = changed_within(content if is_torch else dict(sorted(content.items())), rng)  # else in a chance order
    if not is_torch:
        separate = {str(k): v.contiguous().clone() for k, v in changed.items() if isinstance(v, Tensor)}
        return safetensors.torch.save(separate)
    buffer = io.BytesIO()
    torch.save(
        changed,
        buffer,
        _use_new_zipfile_serialization=rng.random() < 0.7,
        pickle_protocol=rng.choice((2, 2, 3, 4, 5)),
    )
    return buffer.getvalue()


def changed_within(content: Mapping[str, Any], rng: random.Random) -> Any:
    """Change an entry of weights, or of what stands beside them."""
    inner = [key for key, value in content.items() if isinstance(value, dict)]
    if inner and rng.random() < 0.8:
        key = rng.choice(inner)
        return {**content, key: changed_within(content[key], rng)}
    key, other = rng.choice(list(content)), rng.choice(list(content))
    value = content[key]
    if not isinstance(value, Tensor):
        return {**content, key: rng.choice((None, -1, "x", [value], {}, Bomb(CANARY)))}
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(rng.randrange(100)))
    first = value.reshape(-1)[:1]
    ways: tuple[dict[Any, Any], ...] = (
        {key: None, rng.choice(KEYS): value},
        {key: None, rng.choice((f"{key}x", f"head.{key}", key.upper(), 7)): value},
        {key: None},
        {rng.choice(KEYS): rng.choice((value, first.clone(), noise))},
        {key: rng.choice((value.reshape(-1), value[None], value.movedim(0, -1), value[:1], value.reshape(-1)[0]))},
        {key: value.to(rng.choice(DTYPES))},
        {key: content[other], other: value},
        {key: content[other]},
        {key: noise},
        {key: first.expand(value.shape)},
        {key: value / 0},
        {key: nn.Parameter(noise)},
        {key: rng.choice((3, "x", [value], {"x": value}, argparse.Namespace(x=value), Bomb(CANARY)))},
        {"args": rng.choice((argparse.Namespace(lr=1), Bomb(CANARY), {"lr": 1}))},
        {**dict.fromkeys(content), **{rng.choice(PREFIXES) + k: v for k, v in content.items()}},
    )
    weights = {**content, **rng.choice(ways)}
    return {key: value for key, value in weights.items() if value is not None}


def change_onnx(data: bytes, rng: random.Random) -> bytes:
    """Change a node, or the name, sizes, type, bytes or place of a tensor."""
    model = onnx.load_model_from_string(data)
    graph, number = model.graph, rng.choice(NUMBERS) % 2**31
    tensor, other = rng.choice(graph.initializer), rng.choice(graph.initializer)
    node = rng.choice(graph.node)

    def into(target: Any, source: Any) -> None:
        target.CopyFrom(source)

    ways: list[Callable[[], Any]] = [
        lambda: setattr(tensor, "name", other.name),
        lambda: setattr(tensor, "name", "other"),
        lambda: graph.initializer.remove(tensor),
        lambda: graph.initializer.append(other),
        lambda: tensor.dims.append(number),
        lambda: tensor.dims.reverse(),
        lambda: setattr(tensor, "data_type", rng.randrange(24)),
        lambda: setattr(tensor, "raw_data", tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]),
        lambda: setattr(tensor, "raw_data", other.raw_data),
        lambda: tensor.float_data.append(1.0),
        lambda: setattr(tensor, "data_location", 1 - tensor.data_location),
        lambda: into(tensor, other),
        lambda: graph.node.remove(node),
        lambda: graph.node.append(node),
        lambda: setattr(node, "op_type", rng.choice(graph.node).op_type),
        lambda: node.input.reverse(),
        lambda: setattr(node, "domain", "other"),
        lambda: setattr(model, "ir_version", number),
    ]
    for entry in tensor.external_data:
        values = ("../model.data", "/dev/zero", "model.onnx", "model.data", "64", "-1", str(number))
        ways += [lambda entry=entry, value=value: setattr(entry, "value", value) for value in values]
    rng.choice(ways)()
    return model.SerializeToString()


BYTES: tuple[Maker, ...] = (*DAMAGE, blank)
TORCH: tuple[Maker, ...] = (*[change_opcodes] * 4, *[change_entries] * 6)
