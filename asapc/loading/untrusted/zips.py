"""Looks through the directories of zip archives before anything is unpacked."""

import zipfile
from stat import S_ISLNK
from typing import IO

from asapc.loading.untrusted.refusals import Kind, unreadable

# Deflate packs up to 1032 : 1, real arrays seldom beyond 100 : 1. Small files may unpack to this much anyway.
PACKED_RATIO, PACKED_BYTES = 100, 2**28


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
