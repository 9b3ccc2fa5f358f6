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
    """A stage reports progress; `remaining` are the seconds that it will still take, where that is known."""

    stage: str
    detail: str
    remaining: float | None = None


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

    def advance(self, detail: str, remaining: float | None = None) -> None:
        """Report what the stage is doing now, and how many seconds it will still take where that is known."""
        self.on_event(StageAdvanced(self.name, detail, remaining))

    def wait(self, detail: str) -> None:
        """Report the beginning of something long of which no progress is known."""
        self.on_event(StageWaits(self.name, detail))


class Timed:
    """Passes events on, and keeps how long stages took.

    Attributes:
        seconds: by the stage's name, of those that are done.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.seconds: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, StageDone):
            self.seconds[event.stage] = event.seconds
        self.on_event(event)


@contextmanager
def stage(name: str, on_event: OnEvent) -> Iterator[Stage]:
    """Announce a stage, time it, and announce its end unless it raises."""
    on_event(StageStarted(name))
    start = time.perf_counter()
    handle = Stage(name, on_event)
    yield handle
    on_event(StageDone(name, time.perf_counter() - start, handle.summary))
