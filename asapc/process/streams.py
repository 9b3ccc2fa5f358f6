"""Standard output and error that may be closed, full, or a pipe that nobody reads to its end."""

import os
import sys
from typing import Any, TextIO

from asapc.errors import OutputError


class Stream:
    """A standard stream, whichever it is at the moment, as an object to write to.

    What a closed stream or pipe does not take is dropped: that nobody reads on, as after `| head`, is no error.

    Args:
        name: `stdout` or `stderr`.
        required: whether what cannot be written there for another reason, as on a full disk, is an error.
    """

    def __init__(self, name: str, required: bool) -> None:
        self.name, self.required = name, required

    @property
    def stream(self) -> TextIO | None:
        """The stream, None where the process was started without."""
        stream: TextIO | None = getattr(sys, self.name)
        return stream

    def write(self, text: str) -> int:
        """Write a text.

        Raises:
            OutputError: it is required, and cannot be written.
        """
        try:
            if self.stream is not None:
                self.stream.write(text)
        except OSError as error:
            self.give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered; see `write`."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Drop all further output, and raise an error where it is one."""
        # What is still buffered would fail again when Python ends.
        setattr(sys, self.name, open(os.devnull, "w"))  # noqa: SIM115
        if self.required and not isinstance(error, BrokenPipeError):
            why = (error.strerror or "unknown reason").lower()
            raise OutputError(
                f"cannot print on standard output: {why}", "print elsewhere; files that were written are whole"
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream or sys.__stderr__, name)


def open_missing() -> None:
    """Open the null device where a standard stream is closed, so that no file that is written takes its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
