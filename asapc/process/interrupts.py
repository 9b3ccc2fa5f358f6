"""Ctrl-C and SIGTERM end a run at any moment, and what it began is cleaned up.

The handler raises `Interrupted` and remembers the signal. Code that catches everything may swallow the exception, as
callbacks from native code and imports do; `check`, called between steps, then raises it again.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# SIGHUP is what a closing terminal sends; Windows has none.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal that ends the run, under a name of its own.

    Where a plain KeyboardInterrupt passes through `exec` of a string, as in the making of a dataclass, Python under
    `-m` remembers it and dies of SIGINT at the end, whoever has caught it.
    """


@dataclass
class State:
    """Of this process.

    Attributes:
        signal: the last one received, 0 for none.
        holds: how many blocks are open that no signal may break.
        outputs: what was written by now, in full.
    """

    signal: int = 0
    holds: int = 0
    outputs: list[str] = field(default_factory=list)


state = State()


def check() -> None:
    """Raise Interrupted if a signal was received, unless a block holds it back."""
    if state.signal and not state.holds:
        raise Interrupted


@contextmanager
def held() -> Iterator[None]:
    """Hold signals back until the block ends, as for clean-up, which must not stop half-way."""
    state.holds += 1
    try:
        yield
    finally:
        state.holds -= 1
    check()


def remember(number: int, frame: object) -> None:
    """Handle a signal."""
    state.signal = number
    check()


def exit_code() -> int:
    """Return the exit code of a run that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (state.signal or signal.SIGINT)


def message() -> str:
    """Return what to tell the user that an interrupted run leaves behind."""
    if not state.outputs:
        return "interrupted; no output was written"
    return f"interrupted; written in full before that: {', '.join(state.outputs)}"


@contextmanager
def handled() -> Iterator[None]:
    """Handle signals in the block, which is the whole run; it ends with their exit code even if they are swallowed."""
    # Left alone where they are ignored, as by a shell for its background jobs or by nohup.
    defaults = (signal.default_int_handler, signal.SIG_DFL)
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in defaults}
    sys.unraisablehook, hook = silence, sys.unraisablehook
    for number in before:
        signal.signal(number, remember)
    try:
        yield
        check()
    except BaseException:
        if not state.signal:
            raise
        raise SystemExit(exit_code()) from None
    finally:
        # All is written and cleaned up: what takes its time now is Python's own end, which a signal may cut short.
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        sys.unraisablehook = hook


def silence(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hide an interruption that came where no exception can go, as in a destructor: it is remembered."""
    if not issubclass(unraisable.exc_type, Interrupted):
        sys.__unraisablehook__(unraisable)
