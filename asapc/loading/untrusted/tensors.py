"""Reads tensors from files of torch.save, safetensors and numpy, without ever running code that they hold."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from asapc.errors import AsapcError
from asapc.loading.untrusted.files import check_file
from asapc.loading.untrusted.pickles import PICKLE_BYTES, check_pickle
from asapc.loading.untrusted.refusals import DAMAGED, Kind, unreadable, would_run
from asapc.loading.untrusted.zips import check_zip

# Levels of containers; a checkpoint has less than ten.
DEEPEST = 100
# Views that overlap (tied weights, expanded masks) may claim more than the file holds, up to this many times its size.
VIEWS_RATIO, VIEWS_BYTES = 8, 2**28


@contextmanager
def damage(path: object, kind: Kind) -> Iterator[None]:
    """Turn whatever a reader raises into one message; readers raise what the damage happens to trigger."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats; the message says all there is to say
            yield
    except AsapcError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise would_run(path, kind) from None
        raise unreadable(path, kind) from None
    except MemoryError:
        raise unreadable(path, kind, "it claims more memory than there is") from None
    except Exception:
        raise unreadable(path, kind) from None


def read_torch(path: Path, kind: Kind) -> Any:
    """What a file of torch.save holds: tensors, numbers, strings and containers of them, nothing else.

    Raises:
        AsapcError: of the given kind: the file cannot be read, would run code, or claims more than it holds.
    """
    size = check_file(path, kind)
    with path.open("rb") as file:
        return read_torch_stream(file, size, path, kind)


def read_torch_stream(file: IO[bytes], size: int, where: object, kind: Kind) -> Any:
    """`read_torch` of an open file of so many bytes; `where` is what messages call it."""
    check_torch(file, where, kind)
    file.seek(0)
    with damage(where, kind):
        return plain(torch.load(file, map_location="cpu", weights_only=True), size, where, kind)


def check_torch(file: IO[bytes], where: object, kind: Kind) -> None:
    """Look through the pickles of a file of torch.save, of today's format or of that before torch 1.6."""
    start = file.read(4)
    file.seek(0)
    if start != b"PK\x03\x04":
        if not start.startswith(b"\x80"):
            raise unreadable(where, kind)
        # Magic number, protocol, system, content, names of storages; the storages follow as they lie in memory.
        for _ in range(5):
            check_pickle(file, where, kind)
            if file.tell() > PICKLE_BYTES:
                raise unreadable(where, kind, "its pickles are too long")
        return
    members = [m for m in check_zip(file, where, kind) if m.filename.lower().endswith(".pkl")]
    if [m.filename.partition("/")[2] for m in members] != ["data.pkl"]:
        raise unreadable(where, kind, "it is no file of torch.save")
    if members[0].file_size > PICKLE_BYTES:
        raise unreadable(where, kind, "its pickle is too long")
    with damage(where, kind), zipfile.ZipFile(file) as archive:
        content = io.BytesIO(archive.read(members[0]))
    check_pickle(content, where, kind)


def plain(content: Any, size: int, where: object, kind: Kind) -> Any:
    """A file's content as plain dicts, lists, tuples and tensors without gradients or hooks.

    A pickle may give any attribute to the containers it builds, `keys` for one, so that they are built anew.

    Args:
        content: what was read.
        size: bytes of the file.
        where: what messages call it.
        kind: of the errors.
    """
    known: dict[int, Any] = {}
    storages: set[int] = set()
    stored = claimed = 0

    def visit(value: Any, depth: int) -> Any:
        nonlocal stored, claimed
        if not isinstance(value, (Tensor, dict, list, tuple, set)) or isinstance(value, torch.Size):
            return value
        if id(value) in known:
            return known[id(value)]
        if depth > DEEPEST:
            raise unreadable(where, kind, "it nests containers too deeply")
        made: Any
        if isinstance(value, Tensor):
            made = known[id(value)] = value.detach()
            storage = made.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                stored += storage.nbytes()
            claimed += made.numel() * made.itemsize
            if stored > size or claimed > max(VIEWS_RATIO * size, VIEWS_BYTES):
                raise unreadable(where, kind, f"its tensors claim more bytes than its {size:,} can hold")
        elif isinstance(value, dict):
            made = known[id(value)] = {}
            made.update((key, visit(item, depth + 1)) for key, item in dict.items(value))
        else:
            made = known[id(value)] = []
            made += [visit(item, depth + 1) for item in value]
            if isinstance(value, tuple):
                made = known[id(value)] = tuple(made)
        return made

    return visit(content, 0)


def read_safetensors(path: Path, kind: Kind) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, which holds no code; the library checks its header against its size."""
    from safetensors.torch import load_file

    check_file(path, kind)
    with damage(path, kind):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


def read_npz(path: Path, kind: Kind) -> dict[str, Tensor]:
    """Arrays of a .npz file as tensors: numbers only, as large as the file says.

    Raises:
        AsapcError: of the given kind.
    """
    import numpy as np

    check_file(path, kind)
    arrays = {}
    with path.open("rb") as file:
        members = check_zip(file, path, kind, packed=True)
        with damage(path, kind), zipfile.ZipFile(file) as archive:
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    check_array(stream, member.file_size, f"{name} in {path}", kind)
                with archive.open(member) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                arrays[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    return arrays


def check_array(stream: IO[bytes], size: int, where: str, kind: Kind) -> None:
    """Refuse a .npy of so many bytes whose header claims anything but the numbers that follow it."""
    import numpy as np

    major, _ = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise would_run(where, kind)
    if dtype.kind not in "biuf":
        raise unreadable(where, kind, f"it holds {dtype}", "give an intact .npz of numbers")
    if prod(shape) * dtype.itemsize != size - stream.tell():
        raise unreadable(where, kind, DAMAGED)
