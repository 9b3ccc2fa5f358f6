"""Compilations without the rivals, each of which takes longer to export than all that most tests are about."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from asapc.writing.rewrite import export_rivals


@contextmanager
def without_rivals() -> Iterator[None]:
    """Let the teacher stand for all rivals while the block runs."""

    def teachers(studied, variants, threads, advance):
        (runner,) = export_rivals(studied, {"teacher": {}}, threads, advance).values()
        return dict.fromkeys(variants, runner)

    with patch("asapc.commands.compile.export_rivals", teachers):
        yield
