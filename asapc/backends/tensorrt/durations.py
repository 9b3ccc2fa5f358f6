"""Remembers how long builds took, and what the compiler said before a crash, in the user's cache folder.

The folder is safe to delete at any time, and whatever goes wrong with it is none of the user's concern.
"""

import json
from contextlib import suppress
from pathlib import Path

from asapc.process.caches import cache_folder, replacing

MOST = 200  # builds; the oldest go first
TAIL = 300  # lines of a log


def folder() -> Path:
    """Return where they are."""
    return cache_folder("engines")


def last_duration(key: str) -> float | None:
    """Return the seconds that the last build under a key took."""
    seconds = durations().get(key)
    return float(seconds) if isinstance(seconds, int | float) and seconds >= 0 else None


def keep_duration(key: str, seconds: float) -> None:
    """Remember the seconds that a build took."""
    content = {name: value for name, value in durations().items() if name != key} | {key: round(seconds, 1)}
    newest = dict(list(content.items())[-MOST:])
    write("durations.json", json.dumps(newest))


def durations() -> dict[str, object]:
    """Return all that is kept, the newest last; nothing where the file is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder() / "durations.json").read_text())
        if isinstance(content, dict):
            return content
    return {}


def keep_tail(log: Path) -> Path | None:
    """Keep the end of a log, and return where it is; None where it cannot be kept."""
    with suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()[-TAIL:]
        return write("crash.log", "\n".join(lines) + "\n") if lines else None
    return None


def write(name: str, text: str) -> Path | None:
    """Write a file of the folder, which is there whole or as it was; return its path, None where that fails."""
    with suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with replacing(folder() / name) as partial:
            partial.write_text(text)
        return folder() / name
    return None
