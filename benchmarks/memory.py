"""How much memory this process holds, as Linux counts it."""

from collections.abc import Callable
from pathlib import Path

PROCESS = Path("/proc/self")


def held(field: str) -> int:
    """Return a size of this process in bytes: VmRSS, what it holds, or VmHWM, the most that it held.

    Its own, while getrusage starts from its parent's.
    """
    (line,) = (line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def growth(work: Callable[[], object]) -> int:
    """Return by how many bytes this process grows, at its peak, while it does some work."""
    (PROCESS / "clear_refs").write_text("5")  # man 5 proc: the peak starts again from what is held now
    before = held("VmRSS")
    work()
    return held("VmHWM") - before
