"""What timing on a GPU needs besides: a GPU that has come to rest at its speed, and a record of its clocks."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from math import inf
from statistics import median

from asapc.types.results import Clocks

# Clocks rise within milliseconds of work and fall again as the chip gets warm. The speed has settled once the medians
# of two windows in a row differ by no more than this.
WINDOW, SAME, MAX_SECONDS = 10, 0.02, 3.0
QUERY = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"


def settle(time_once: Callable[[], float]) -> bool:
    """Run something again and again until it takes the same time, and return whether it comes to that.

    Args:
        time_once: runs it, and returns what it took.
    """
    before, end = inf, time.perf_counter() + MAX_SECONDS
    while time.perf_counter() < end:
        now = median(time_once() for _ in range(WINDOW))
        if abs(now - before) <= SAME * before < inf:
            return True
        before = now
    return False


def clocks() -> tuple[Clocks, ...]:
    """Return the state of the first GPU that is visible to CUDA, by the driver's nvidia-smi; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", *([f"--id={first}"] if first else [])]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    lines = ran.stdout.strip().splitlines()
    fields = lines[0].split(",") if lines and ran.returncode == 0 else []
    return (Clocks(*map(number, fields)),) if len(fields) == len(QUERY.split(",")) else ()


def number(field: str) -> float | None:
    """Return a number, None where the driver has "[N/A]" instead."""
    try:
        return float(field)
    except ValueError:
        return None
