"""Looks into files before any reader does, and refuses what could run code or take memory beyond the file's size.

A file is material from strangers. Its directory, its headers and the opcodes of its pickles are small and say all that
it is about to do, so that they are looked through first. What passes is still read without running code.
"""

import errno
import hashlib
import pickletools
import zipfile
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import IO, Any, Literal

from asapc.errors import AsapcError, CheckpointError, OptionError, SamplesError

Kind = type[CheckpointError] | type[SamplesError] | type[OptionError]
Format = Literal["onnx", "safetensors", "torch", "torchscript", "exported", "arrays"]

DAMAGED = "it is damaged, or of another format"
RUNS_CODE = "would run code when loaded"
INTACT = "give an intact copy of the file"
# Deflate packs up to 1032 : 1, real arrays seldom beyond 100 : 1. Small files may unpack to this much anyway.
PACKED_RATIO, PACKED_BYTES = 100, 2**28
# The pickle of a checkpoint of a thousand tensors takes 100 kB.
PICKLE_BYTES = 2**25
# Elements of a tuple with all that is nested in it. Python hashes nested tuples without looking at its stack, so that
# one of a million levels crashes it, and one that holds itself a hundred times over keeps it busy for ever.
TUPLE_ELEMENTS = 1000

# What a pickle may name: what plain tensors and containers are built of. Storages and dtypes come below.
GLOBALS = {
    "collections OrderedDict",
    "collections Counter",
    "_codecs encode",
    "__builtin__ set",
    "builtins set",
    "__builtin__ complex",
    "builtins complex",
    "torch Size",
    "torch device",
    "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
}
GLOBALS |= {f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char")}
GLOBALS |= {f"torch {kind}Storage" for kind in ("Byte", "Bool", "ComplexDouble", "ComplexFloat")}
GLOBALS |= {f"torch {kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)}
GLOBALS |= {"torch bfloat16", "torch bool", "torch complex64", "torch complex128"}
GLOBALS |= {f"torch float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")}


def unreadable(path: object, kind: Kind, why: str = DAMAGED, hint: str = INTACT) -> AsapcError:
    """The error that says why a file cannot be read."""
    return kind(f"cannot read {path}: {why}", hint)


def check_file(path: Path, kind: Kind) -> int:
    """Size of a regular file in bytes, never zero; a link is followed.

    Raises:
        AsapcError: of the given kind. There is none, it is no regular file (reading a pipe or a device may never end),
            it is empty, or it may not be read.
    """
    try:
        status = path.stat()
        if S_ISDIR(status.st_mode):
            raise unreadable(path, kind, "it is a folder")
        if not S_ISREG(status.st_mode):
            raise unreadable(path, kind, "it is no regular file", "give a file, not a pipe or a device")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise unreadable(path, kind, "no such file", "check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        why = "no permission" if getattr(error, "errno", None) == errno.EACCES else getattr(error, "strerror", None)
        raise unreadable(path, kind, (why or str(error)).lower(), "check the path") from None
    if status.st_size == 0:
        raise unreadable(path, kind, "it is empty")
    return status.st_size


def check_zip(file: IO[bytes], where: object, kind: Kind, packed: bool = False) -> list[zipfile.ZipInfo]:
    """The directory of a zip archive whose members are as large as they say, and stay inside it.

    Args:
        file: the archive.
        where: what messages call it.
        kind: of the errors.
        packed: whether members may be compressed. torch writes none.

    Raises:
        AsapcError: of the given kind.
    """
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception:  # zipfile raises whatever the damage happens to trigger
        raise unreadable(where, kind) from None
    # torch looks names up without regard to case.
    if len({member.filename.lower() for member in members}) < len(members):
        raise unreadable(where, kind, "two members of the archive have one name")
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        if S_ISLNK(member.external_attr >> 16) or ".." in parts or not parts[0] or ":" in parts[0]:
            raise unreadable(where, kind, f"its member {member.filename[:80]!r} leads out of the archive")
        if member.flag_bits & 1:
            raise unreadable(where, kind, "it is encrypted", "give it without a password")
        if member.compress_type != zipfile.ZIP_STORED and not packed:
            raise unreadable(where, kind, "it is compressed, which torch never does", "unpack it, or save it anew")
    claimed = sum(member.file_size for member in members)
    if claimed > (max(PACKED_RATIO * size, PACKED_BYTES) if packed else size):
        raise unreadable(where, kind, f"its members claim {claimed:,} bytes, the file has {size:,}")
    return members


def check_pickle(stream: Any, where: object, kind: Kind) -> None:
    """Look through the opcodes of one pickle, without executing any.

    Args:
        stream: binary file, at the start of the pickle; afterwards behind it.
        where: what messages call the file.
        kind: of the errors.

    Raises:
        AsapcError: of the given kind: it names anything but what tensors and containers are built of, or it has
            tuples that Python could not hash.
    """
    stack: list[int] = []  # for each value the elements of a tuple, 1 for all else; 0 for a mark
    memo: dict[int, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            name, before = opcode.name, [item.name for item in opcode.stack_before]
            if name == "GLOBAL" and argument in GLOBALS:
                stack.append(1)
            elif name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise would_run(where, kind, argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument or 0] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument or 0])
            else:
                parts = pop(stack, before)
                elements = 1 + sum(parts) if name.startswith("TUPLE") else 1
                if elements > TUPLE_ELEMENTS:
                    raise unreadable(where, kind, "it nests tuples too deeply")
                stack += [0 if item.name == "mark" else elements for item in opcode.stack_after]
    except AsapcError:
        raise
    except Exception:  # genops, or a stack that runs empty: this is no pickle
        raise unreadable(where, kind) from None


def pop(stack: list[int], before: list[str]) -> list[int]:
    """Take off a stack what an opcode takes; `before` is its own description of that."""
    parts = []
    if "mark" in before:
        while (part := stack.pop()) != 0:
            parts.append(part)
        before = before[: before.index("mark")]
    return parts + [stack.pop() for _ in before]


def would_run(where: object, kind: Kind, name: object = None) -> AsapcError:
    """The error for a file whose pickle could run code."""
    named = f" ({str(name).replace(' ', '.')[:80]})" if name else ""
    samples = "save arrays of numbers by input name, with numpy.savez or torch.save"
    return kind(
        f"{where} holds Python objects that {RUNS_CODE}{named}; nothing was run",
        samples if kind is SamplesError else "save tensors only: model.state_dict(), not the model",
    )


def detect(path: Path) -> Format:
    """What a model file is: by its suffix where that is all there is to go by, else by what it holds.

    Raises:
        CheckpointError: it is none of these.
    """
    check_file(path, CheckpointError)
    if path.suffix == ".onnx":
        return "onnx"
    if path.suffix == ".safetensors":
        return "safetensors"
    with path.open("rb") as file:
        start = file.read(4)
        if start.startswith(b"\x80"):
            return "torch"
        if start != b"PK\x03\x04":
            raise unreadable(path, CheckpointError)
        members = check_zip(file, path, CheckpointError, packed=True)
    names = {member.filename.partition("/")[2] or member.filename for member in members}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "exported"
    return "torch" if "data.pkl" in names else "arrays"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
