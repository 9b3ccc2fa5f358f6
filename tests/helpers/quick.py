"""Compilations without what takes longer than all that most tests are about."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from asapc.backends.tensorrt.builder import build_engine
from asapc.fidelity.latency import measure
from asapc.writing.rewrite import export_rivals


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Let the exact form stand for all rivals, build engines for one architecture, and measure for a moment only."""

    def one_for_all(studied, variants, threads, advance):
        name = "exact" if "exact" in variants else "teacher"
        (runner,) = export_rivals(studied, {name: variants[name]}, threads, advance).values()
        return dict.fromkeys(variants, runner)

    def for_a_moment(runners, samples, batch, seconds, seed):
        return measure(runners, samples, batch, 0.05, seed, rounds=2)

    engines = partial(build_engine, architectures=("SM89",))
    with (
        patch("asapc.commands.compile.export_rivals", one_for_all),
        patch("asapc.commands.compile.measure", for_a_moment),
        patch("asapc.backends.tensorrt.builder.build_engine", engines),
    ):
        yield
