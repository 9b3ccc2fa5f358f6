"""Reads tensors from files of torch.save, safetensors and numpy, without ever running code that they hold."""

import io
import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import IO, Any

import torch
from torch import Tensor

from asapc.loading.untrusted import unpickler
from asapc.loading.untrusted.pickles import MAX_PICKLE_BYTES, check_pickle
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.zips import check_zip
from asapc.types.plain import MAX_NESTING

METADATA = "_metadata"  # where torch keeps the versions of modules, beside the weights of a state dict
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Views that overlap (tied weights, expanded masks) may claim more than the file holds, up to this many times its size.
MAX_VIEWS_RATIO, MAX_VIEWS_BYTES = 8, 2**28


def read_torch(source: Source) -> Any:
    """Read a file of torch.save: tensors, numbers, strings and containers of them, nothing else.

    Raises:
        AsapcError: of the source's class. The file cannot be read, would run code, or claims more than it holds.
    """
    with source.path.open("rb") as file:
        return read_torch_stream(file, source)


def read_torch_stream(file: IO[bytes], source: Source) -> Any:
    """Read an open file or a member of an archive, as `read_torch` does."""
    content, unread = read_torch_parts(file, source)
    if unread:
        raise source.would_run(unread[0])
    return content


def read_torch_parts(file: IO[bytes], source: Source) -> tuple[Any, tuple[str, ...]]:
    """Read what a file of torch.save holds of tensors, numbers, strings and containers of them.

    Returns:
        The content, and the names of the classes and functions of whatever else it holds; for each of these objects an
        `Unread` stands in the content. Nothing is imported or run.

    Raises:
        AsapcError: of the source's class. The file cannot be read, or claims more than it holds.
    """
    check_torch(file, source)
    file.seek(0)
    plain = Plain(source)
    with source.reading(), without_forced_reader():
        # Its find_class makes this as safe as weights_only=True, which takes no other unpickler.
        content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=unpickler)
        return plain.copy(content), tuple(plain.unread)


@contextmanager
def without_forced_reader() -> Iterator[None]:
    """Set aside the variable of the environment by which users keep torch from all readers but its own."""
    forced = os.environ.pop(FORCED, None)
    try:
        yield
    finally:
        if forced is not None:
            os.environ[FORCED] = forced


def check_torch(file: IO[bytes], source: Source) -> None:
    """Look through the pickles of a file of torch.save, of today's format or of that before torch 1.6."""
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        check_pickle(pickle_member(file, source), source)
        return
    if not start.startswith(b"\x80"):
        raise source.refuse()
    # Magic number, protocol, system, content, names of storages; the storages follow as they lie in memory.
    for _ in range(5):
        check_pickle(file, source)
        if file.tell() > MAX_PICKLE_BYTES:
            raise source.refuse("its pickles are too long")


def pickle_member(file: IO[bytes], source: Source) -> IO[bytes]:
    """Read the one pickle of a zip archive of torch.save."""
    members = [m for m in check_zip(file, source) if m.filename.lower().endswith(".pkl")]
    if [m.filename.partition("/")[2] for m in members] != ["data.pkl"]:
        raise source.refuse("it was not written by torch.save")
    if members[0].file_size > MAX_PICKLE_BYTES:
        raise source.refuse("its pickle is too long")
    with source.reading(), zipfile.ZipFile(file) as archive:
        content = archive.read(members[0])
    return io.BytesIO(content)


class Plain:
    """Copies a file's content as plain dicts, lists, tuples and tensors without gradients or hooks.

    A pickle may give any attribute to the containers that it builds, `keys` for one, so they are built anew.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.copies: dict[int, Any] = {}  # by the id of the original: content may refer to itself
        self.storages: set[int] = set()
        self.stored = self.claimed = 0
        self.unread: dict[str, None] = {}  # names, each once and in order

    def copy(self, value: Any, depth: int = 0) -> Any:
        """Copy one value with all that it holds.

        Raises:
            AsapcError: of the source's class. It nests too deeply, or its tensors claim more than the source holds.
        """
        self.note(value)
        if not isinstance(value, (Tensor, dict, list, tuple, set, frozenset)) or isinstance(value, torch.Size):
            return value
        if id(value) in self.copies:
            return self.copies[id(value)]
        if depth > MAX_NESTING:
            raise self.source.refuse("it nests containers too deeply")
        if isinstance(value, Tensor):
            self.count(value)
            self.copies[id(value)] = value.detach()
        elif isinstance(value, dict):
            entries = self.copies[id(value)] = OrderedDict()
            self.note(*dict.keys(value))
            entries.update((key, self.copy(item, depth + 1)) for key, item in dict.items(value))
            if versions := module_versions(value):
                setattr(entries, METADATA, versions)
        else:
            items = self.copies[id(value)] = []
            items += [self.copy(item, depth + 1) for item in value]
            if isinstance(value, tuple):
                self.copies[id(value)] = tuple(items)
        return self.copies[id(value)]

    def note(self, *values: Any) -> None:
        """Write down the names of those values that were not read."""
        self.unread |= {name: None for name in map(unpickler.name_of, values) if name is not None}

    def count(self, tensor: Tensor) -> None:
        """Add up the bytes of storages and of views, and refuse what the source cannot hold."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            self.stored += storage.nbytes()
        self.claimed += tensor.numel() * tensor.itemsize
        size = self.source.size
        if self.stored > size or self.claimed > max(MAX_VIEWS_RATIO * size, MAX_VIEWS_BYTES):
            raise self.source.refuse(f"its tensors claim more bytes than its {size:,} can hold")


def module_versions(value: dict[Any, Any]) -> dict[str, dict[str, int]]:
    """Return the versions of modules that torch keeps beside the weights of a state dict; empty where there are none.

    Modules look at them when they load weights of an older kind.
    """
    metadata = getattr(value, "__dict__", {}).get(METADATA)
    if not isinstance(metadata, dict):
        return {}
    return {
        name: {"version": entry["version"]}
        for name, entry in dict.items(metadata)
        if isinstance(name, str) and isinstance(entry, dict) and isinstance(dict.get(entry, "version"), int)
    }


def read_safetensors(source: Source) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, which holds no code; the library checks its header against its size.

    Raises:
        AsapcError: of the source's class. The file cannot be read.
    """
    from safetensors.torch import load_file

    with source.reading():
        tensors: dict[str, Tensor] = load_file(source.path)
    return tensors


def read_npz(source: Source) -> dict[str, Tensor]:
    """Read the arrays of a .npz file as tensors: numbers only, as large as the file says.

    Raises:
        AsapcError: of the source's class.
    """
    arrays = {}
    with source.path.open("rb") as file:
        members = check_zip(file, source, compressed=True)
        with source.reading(), zipfile.ZipFile(file) as archive:
            for member in members:
                name = member.filename.removesuffix(".npy")
                arrays[name] = read_array(archive, member, source.member(name, member.file_size))
    return arrays


def read_npy(source: Source) -> Tensor:
    """Read a .npy file as a tensor: numbers only, as many as the file holds.

    Raises:
        AsapcError: of the source's class.
    """
    with source.reading(), source.path.open("rb") as file:
        return read_stream(file, source)


def read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, source: Source) -> Tensor:
    """Read one array of a .npz file as a tensor."""
    with archive.open(member) as stream:
        return read_stream(stream, source)


def read_stream(stream: IO[bytes], source: Source) -> Tensor:
    """Read an array of numpy's format as a tensor, in the byte order of this machine."""
    import numpy as np

    check_array(stream, source)
    stream.seek(0)
    array = np.lib.format.read_array(stream, allow_pickle=False)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def check_array(stream: IO[bytes], member: Source) -> None:
    """Refuse a .npy whose header claims anything but the numbers that follow it."""
    import numpy as np

    major, _ = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise member.would_run()
    if dtype.kind not in "biuf":
        raise member.refuse(f"it holds {dtype}", "give an intact file of numbers")
    if prod(shape) * dtype.itemsize != member.size - stream.tell():
        raise member.refuse()
