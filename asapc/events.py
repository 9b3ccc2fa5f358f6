"""Progress as events through one callback; the library itself prints nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StageStarted:
    """A stage of the compilation begins."""

    stage: str


@dataclass(frozen=True)
class StageAdvanced:
    """A stage reports progress."""

    stage: str
    detail: str


@dataclass(frozen=True)
class StageWaits:
    """A stage begins something long that tells nothing of its progress; `detail` says what, and how long it took."""

    stage: str
    detail: str


@dataclass(frozen=True)
class StageDone:
    """A stage ended without an error; `detail` sums up its result."""

    stage: str
    seconds: float
    detail: str


Event = StageStarted | StageAdvanced | StageWaits | StageDone
OnEvent = Callable[[Event], None]


class Stage:
    """Handle of a running stage: `advance` reports progress, `summary` becomes the detail of its end."""

    def __init__(self, name: str, on_event: OnEvent) -> None:
        self.name, self.on_event, self.summary = name, on_event, ""

    def advance(self, detail: str) -> None:
        """Report what the stage is doing now."""
        self.on_event(StageAdvanced(self.name, detail))

    def wait(self, detail: str) -> None:
        """Report the beginning of something long of which no progress is known."""
        self.on_event(StageWaits(self.name, detail))


@contextmanager
def stage(name: str, on_event: OnEvent) -> Iterator[Stage]:
    """Announce a stage, time it, and announce its end unless it raises."""
    on_event(StageStarted(name))
    start = time.perf_counter()
    handle = Stage(name, on_event)
    yield handle
    on_event(StageDone(name, time.perf_counter() - start, handle.summary))
