"""Looks through the directories of zip archives before anything is unpacked.

A zip file can be read from its end, by the directory, or from its start, by the headers of its members; and readers
differ in which of several directories they take. An archive that passes here reads the same to all of them: its
members fill it from the first byte to the directory, and the directory from there to the one record at the end.
"""

import struct
import zipfile
from stat import S_ISLNK
from typing import IO

from asapc.loading.untrusted.source import Source

# Deflate packs up to 1032 : 1, real arrays seldom beyond 100 : 1. Small files may unpack to this much anyway.
MAX_RATIO, MAX_SMALL_BYTES = 100, 2**28
# Of the format: the records, and the bits and fields in them that matter here.
HEADER, END, END64, LOCATOR = (struct.Struct(f"<4s{f}") for f in ("5H3L2H", "4H2LH", "Q2H2L4Q", "LQL"))
DESCRIPTORS = (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))  # behind a member, of sizes in four or eight bytes
HAS_DESCRIPTOR, ENCRYPTED = 8, 1
ZIP64_FIELD, NAME_FIELD = 1, 0x7075
WIDE = 2**32 - 1  # the size stands in another field, of eight bytes


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
            members, start = archive.infolist(), archive.start_dir
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
    try:
        plain = start == end_of_members(file, members) and is_directory(file, start, size, len(members))
    except struct.error:
        plain = False
    if not plain:
        raise source.refuse("its directory and its members differ, so that two readers could read two files")
    return members


def end_of_members(file: IO[bytes], members: list[zipfile.ZipInfo]) -> int | None:
    """Return where the last member of an archive ends, None where members leave gaps or differ from the directory.

    Raises:
        struct.error: a record or a field is cut off, or a field comes twice.
    """
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        file.seek(end)
        signature, _, flags, method, _, _, *facts, name_bytes, extra_bytes = HEADER.unpack(file.read(HEADER.size))
        name, extra = file.read(name_bytes), file.read(extra_bytes)
        stored = (member.CRC, member.compress_size, member.file_size)
        same = (
            member.header_offset == end
            and signature == b"PK\x03\x04"
            and (flags, method) == (member.flag_bits, member.compress_type)
            and name == member.orig_filename.encode("utf-8" if flags & 0x800 else "cp437")
            and (widened(facts, extra) == stored or (flags & HAS_DESCRIPTOR and not any(facts)))
            and NAME_FIELD not in fields(extra).keys() | fields(member.extra).keys()
        )
        if not same:
            return None
        end += HEADER.size + name_bytes + extra_bytes + member.compress_size
        if flags & HAS_DESCRIPTOR:
            file.seek(end)
            after = file.read(24)
            forms = [f.pack(b"PK\x07\x08", *stored) for f in DESCRIPTORS if max(stored) < WIDE or f is DESCRIPTORS[-1]]
            length = next((len(form) for form in forms if after.startswith(form)), 0)
            if not length:
                return None
            end += length
    return end


def is_directory(file: IO[bytes], start: int, size: int, count: int) -> bool:
    """Return whether a directory of so many members fills an archive of `size` bytes from `start` to its end record.

    Raises:
        struct.error: a record is cut off.
    """
    file.seek(size - END.size)
    signature, *disks, here, total, length, offset, comment = END.unpack(file.read(END.size))
    if signature != b"PK\x05\x06" or comment or any(disks):
        return False
    end, wide = size - END.size, (count, count, 0, 0)
    file.seek(max(end - LOCATOR.size - END64.size, 0))
    before = file.read(END64.size + LOCATOR.size)
    if before[-LOCATOR.size :].startswith(b"PK\x06\x07"):
        end -= LOCATOR.size + END64.size
        record, rest, _, _, disk, first, *wide64 = END64.unpack(before[: END64.size])
        locator = LOCATOR.unpack(before[END64.size :])
        if (record, rest, disk, first, locator[1:]) != (b"PK\x06\x06", END64.size - 12, 0, 0, (0, end, 1)):
            return False
        wide = tuple(wide64)
    narrow = zip((here, total, length, offset), (0xFFFF, 0xFFFF, WIDE, WIDE), strict=True)
    values = tuple(w if n == limit else n for (n, limit), w in zip(narrow, wide, strict=True))
    expected = (count, count, end - start, start)
    return values == expected and (end == size - END.size or wide == expected)


def widened(facts: list[int], extra: bytes) -> tuple[int, ...]:
    """Return checksum and sizes of a header; a size that stands in eight bytes is taken from the extra field."""
    checksum, packed, unpacked = facts
    wide = fields(extra).get(ZIP64_FIELD, b"")
    if len(wide) == 16:  # in a header always both, the unpacked first
        sizes = struct.unpack("<2Q", wide)
        pairs = zip((unpacked, packed), sizes, strict=True)
        unpacked, packed = (long if short == WIDE else short for short, long in pairs)
    return checksum, packed, unpacked


def fields(extra: bytes) -> dict[int, bytes]:
    """Return the contents of an extra field by their numbers.

    Raises:
        struct.error: one is cut off, or comes twice, of which readers might take either.
    """
    contents: dict[int, bytes] = {}
    while len(extra) >= 4:
        number, length = struct.unpack("<2H", extra[:4])
        if number in contents or length > len(extra) - 4:
            raise struct.error
        contents[number], extra = extra[4 : 4 + length], extra[4 + length :]
    return contents


def check_member(member: zipfile.ZipInfo, source: Source, compressed: bool) -> None:
    """Refuse a member that leads out of its archive, is encrypted, or is compressed where that is not allowed."""
    parts = member.filename.replace("\\", "/").split("/")
    if S_ISLNK(member.external_attr >> 16) or ".." in parts or not parts[0] or ":" in parts[0]:
        raise source.refuse(f"its member {member.filename[:80]!r} leads out of the archive")
    if member.flag_bits & ENCRYPTED:
        raise source.refuse("it is encrypted", "give it without a password")
    stored = member.compress_type == zipfile.ZIP_STORED
    if not stored and not compressed:
        raise source.refuse("it is compressed, and torch never compresses", "unpack it, or save it again")
    if "\0" in member.orig_filename or (stored and member.compress_size != member.file_size):
        raise source.refuse()
