"""Looks through the directories of zip archives before anything is unpacked."""

import zipfile
from stat import S_ISLNK
from typing import IO

from asapc.loading.untrusted.source import Source

# Deflate packs up to 1032 : 1, real arrays seldom beyond 100 : 1. Small files may unpack to this much anyway.
MAX_RATIO, MAX_SMALL_BYTES = 100, 2**28


def check_zip(file: IO[bytes], source: Source, compressed: bool = False) -> list[zipfile.ZipInfo]:
    """Return the directory of a zip archive after checking that its members stay inside it and within its size.

    Args:
        file: the archive.
        source: the same, for messages.
        compressed: whether members may be compressed. torch writes none.

    Raises:
        AsapcError: of the source's class.
    """
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception:  # zipfile raises whatever the damage happens to trigger
        raise source.refuse() from None
    # torch looks names up without regard to case.
    if len({member.filename.lower() for member in members}) < len(members):
        raise source.refuse("two members of the archive have the same name")
    for member in members:
        check_member(member, source, compressed)
    claimed = sum(member.file_size for member in members)
    if claimed > (max(MAX_RATIO * size, MAX_SMALL_BYTES) if compressed else size):
        raise source.refuse(f"its members claim {claimed:,} bytes, the file has {size:,}")
    return members


def check_member(member: zipfile.ZipInfo, source: Source, compressed: bool) -> None:
    """Refuse a member that leads out of its archive, is encrypted, or is compressed where that is not allowed."""
    parts = member.filename.replace("\\", "/").split("/")
    if S_ISLNK(member.external_attr >> 16) or ".." in parts or not parts[0] or ":" in parts[0]:
        raise source.refuse(f"its member {member.filename[:80]!r} leads out of the archive")
    if member.flag_bits & 1:
        raise source.refuse("it is encrypted", "give it without a password")
    if member.compress_type != zipfile.ZIP_STORED and not compressed:
        raise source.refuse("it is compressed, and torch never compresses", "unpack it, or save it again")
