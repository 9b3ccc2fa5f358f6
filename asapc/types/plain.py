"""Bounds of plain values, such as files of JSON and TOML hold."""

from typing import Any

MAX_NESTING = 100  # levels of containers, of which files have fewer than ten; Python's own limit depends on who calls
MAX_INTEGER = 2**64  # longer ones take quadratic time to print


def check_plain(value: Any, depth: int = 0) -> None:
    """Check that a value neither nests deeply nor holds long integers.

    Raises:
        ValueError: it does; the message says which.
    """
    if depth > MAX_NESTING:
        raise ValueError("it nests too deeply")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError("it holds an integer of more than 64 bits")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            check_plain(item, depth + 1)
