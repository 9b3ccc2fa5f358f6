"""The exceptions of asapc, and the exit code that the command returns for each.

AsapcError                  1   the user's input is at fault; message and hint, no traceback
├── CheckpointError             the model file cannot be read or does not fit its model
├── SamplesError                calibration or held-out samples are missing or unusable
├── OptionError                 an option has a value that asapc does not know
├── CaptureError                the model cannot be captured as one graph
├── NoSinkhornError             nothing to compile was found in the model
├── OutputError                 the output folder cannot be written
├── DependencyError             an optional package is missing
├── BuildError                  a backend refuses the compiled graph
├── InputError                  a compiled model is called with what it does not take
├── FidelityError           3   the compiled model misses the fidelity budget
├── RegressionError         4   the compiled model is slower than what it is held to allows
├── NotComparableError      5   a baseline was taken of another model, or on another machine
└── UnstableError           6   latency was never stable enough to be judged
InternalError              70   a defect in asapc: no AsapcError, so that its traceback is shown
"""

from typing import Any


def printable(text: str) -> str:
    """Replace what would move a terminal's cursor: the text becomes one line."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(error: BaseException) -> str:
    """Put an exception of another library on one line: its first 400 characters, for the cause may stand below."""
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class AsapcError(Exception):
    """An error that the user can fix: `str(error)` says what is wrong, `error.hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        # One line whatever names it quotes: strangers choose those of files and of their contents.
        super().__init__(printable(message))
        self.hint = printable(hint)

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made again of its arguments, of which this one keeps the message alone: pools of processes,
        # which pickle what a worker raises, would break.
        return type(self), (str(self), self.hint), self.__dict__


class CheckpointError(AsapcError):
    """The model file cannot be read, or its weights do not fit the model it names."""


class SamplesError(AsapcError):
    """Calibration or held-out samples are missing, too few, or of the wrong shape, dtype or range."""


class OptionError(AsapcError):
    """An option has a value that asapc does not know."""


class CaptureError(AsapcError):
    """The model cannot be captured as one graph with a dynamic batch."""


class NoSinkhornError(AsapcError):
    """No Sinkhorn attention that can be compiled was found in the model."""


class OutputError(AsapcError):
    """The output folder exists already or cannot be written."""


class DependencyError(AsapcError):
    """An optional package that this step needs is not installed."""


class BuildError(AsapcError):
    """A backend refuses the compiled graph, because of `node` where it says which."""

    def __init__(self, message: str, hint: str, node: str | None = None) -> None:
        super().__init__(message, hint)
        self.node = None if node is None else printable(node)


class InputError(AsapcError):
    """A compiled or accelerated model is called with inputs that it does not take."""


class FidelityError(AsapcError):
    """The compiled model misses the fidelity budget."""

    exit_code = 3


class RegressionError(AsapcError):
    """The compiled model is slower than what it is held to allows."""

    exit_code = 4


class NotComparableError(AsapcError):
    """A baseline was taken of another model, on another machine, with other software, or by a newer asapc."""

    exit_code = 5


class UnstableError(AsapcError):
    """Latency was never stable enough to be judged."""

    exit_code = 6


class InternalError(Exception):
    """A defect in asapc: please report it with the traceback."""

    exit_code = 70
