"""What the machine does while it is measured."""

import time

import psutil

from asapc.types.timing import Conditions

MIN_WATCH = 1.0  # seconds, of which the system's counts say something
BUSY = 0.2  # cores that others may keep busy before that is worth a warning


class Watch:
    """Watches the machine from its creation on, until asked for the `conditions`."""

    def __init__(self) -> None:
        self.start, self.load, self.megahertz = snapshot(), load(), megahertz()

    @property
    def conditions(self) -> Conditions:
        """What was seen."""
        (then, used_then, own_then), (now, used_now, own_now) = self.start, snapshot()
        others = None
        if now - then >= MIN_WATCH and used_now is not None and used_then is not None:
            # The system counts in hundredths of a second.
            others = max(0.0, (used_now - used_then) - (own_now - own_then)) / (now - then)
        return Conditions(cores(), self.load, others, (*self.megahertz, *megahertz()))


def warn_of_load(conditions: Conditions) -> list[str]:
    """Return what the conditions say against the figures."""
    others = conditions.others
    if others is None or others <= BUSY:
        return []
    return [f"other processes kept {others:.1f} cores busy meanwhile"]


def snapshot() -> tuple[float, float | None, float]:
    """Return the time, and the seconds of processors used so far: by all, None if unknown, and by this process."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Time of guests is part of user time, and stolen time is not this machine's.
    extra = sum(getattr(times, name, 0.0) for name in ("guest", "guest_nice", "steal"))
    used = sum(times) - idle - extra
    process = psutil.Process().cpu_times()
    return time.perf_counter(), used if used > 0 else None, process.user + process.system


def load() -> float | None:
    """Return the load average over a minute, None where there is none."""
    return psutil.getloadavg()[0] if hasattr(psutil, "getloadavg") else None


def megahertz() -> tuple[float, ...]:
    """Return the frequency of the CPU; empty where the system does not tell."""
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return ()
    return () if frequency is None else (round(frequency.current, 1),)


def cores() -> tuple[int, ...]:
    """Return the numbers of the cores that this process may run on; empty where the system does not tell."""
    process = psutil.Process()
    return tuple(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else ()
