"""Looks into files before any reader does, and refuses what could run code or take memory beyond the file's size.

A file is material from strangers. Its directory, its headers and the opcodes of its pickles are small and tell all that
it is about to do, so they are checked first. What passes is still read without running code.
"""

from typing import Literal

from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.zips import check_zip

Format = Literal["onnx", "safetensors", "torch", "torchscript", "exported", "arrays"]


def detect(source: Source) -> Format:
    """Return the format of a model file: from its suffix where nothing else tells it, else from its content.

    Raises:
        CheckpointError: it is none of these.
    """
    if source.path.suffix == ".onnx":
        return "onnx"
    if source.path.suffix == ".safetensors":
        return "safetensors"
    with source.path.open("rb") as file:
        start = file.read(4)
        if start.startswith(b"\x80"):
            return "torch"
        if start != b"PK\x03\x04":
            raise source.refuse()
        members = check_zip(file, source, compressed=True)
    names = {member.filename.partition("/")[2] or member.filename for member in members}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "exported"
    return "torch" if "data.pkl" in names else "arrays"
