"""Parses JSON of strangers: bounded in depth and size, and the same for every reader."""

import json
from collections.abc import Iterable
from math import isfinite
from typing import IO, Any, NoReturn

from asapc.loading.untrusted.source import INTACT, Source
from asapc.types.plain import check_plain

MAX_JSON_BYTES = 2**24  # the report of a model with a thousand sites takes a tenth of it
MAX_DIGITS = 20  # of an integer of 64 bits, or its sign and 19


def read_json(source: Source, hint: str = INTACT) -> Any:
    """Read a file of JSON.

    Raises:
        AsapcError: of the source's class. It is too long, or `parse_json` refuses it.
    """
    with source.path.open("rb") as file:
        return read_json_stream(file, source, hint)


def read_json_stream(file: IO[bytes], source: Source, hint: str = INTACT, limit: int = MAX_JSON_BYTES) -> Any:
    """Do as `read_json`, for an open file or a member of an archive, of at most `limit` bytes."""
    if source.size > limit:
        raise source.refuse(f"it has {source.size:,} bytes", hint)
    try:
        return parse_json(file.read(source.size).decode())
    except ValueError as error:
        raise source.refuse(str(error), hint) from None


def parse_json(text: str) -> Any:
    """Parse JSON in which objects have each key once and numbers are finite.

    Raises:
        ValueError: it is not such JSON, nests too deeply or holds an integer of more than 64 bits.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite, parse_int=short
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    check_plain(value)
    return value


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of pairs, of which readers of JSON might take this or that one where keys repeat."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"it has {key[:80]!r} twice")
        entries[key] = value
    return entries


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which are Python's and not JSON's."""
    raise ValueError(f"it holds {name}")


def short(text: str) -> int:
    """Convert an integer, unless it has so many digits that converting them takes long."""
    if len(text) > MAX_DIGITS:
        raise ValueError("it holds an integer of more than 64 bits")
    return int(text)


def finite(text: str) -> float:
    """Convert a number, unless it is beyond what a float can hold."""
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"it holds the number {text[:40]}")
    return number
