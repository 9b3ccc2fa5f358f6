"""Looks into files before any reader does, and refuses what could run code or take memory beyond the file's size.

A file is material from strangers. Its directory, its headers and the opcodes of its pickles are small and say all that
it is about to do, so that they are looked through first. What passes is still read without running code.
"""

import errno
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Literal

from asapc.errors import CheckpointError
from asapc.loading.untrusted.refusals import Kind, unreadable
from asapc.loading.untrusted.zips import check_zip

Format = Literal["onnx", "safetensors", "torch", "torchscript", "exported", "arrays"]


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
