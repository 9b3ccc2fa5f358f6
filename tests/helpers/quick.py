"""Compilations without what takes longer than all that most tests are about."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from asapc.backends.tensorrt.builder import build_engine
from asapc.timing.blocks import Effort, time_blocks
from asapc.writing.rewrite import export_rivals


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Let the exact form stand for all rivals, build engines for one architecture, and measure for a moment only."""

    def one_for_all(studied, variants, threads, folder, advance):
        name = "exact" if "exact" in variants else "teacher"
        (runner,) = export_rivals(studied, {name: variants[name]}, threads, folder, advance).values()
        return dict.fromkeys(variants, runner)

    def for_a_moment(models, samples, batch, effort, settled, advance):
        return time_blocks(models, samples, batch, Effort(0.0, blocks=2, rounds=2), settled, advance)

    def for_one(onnx, path, largest_batch, axes, target, options):
        options = replace(options, architectures=options.architectures or ("SM89",))
        return build_engine(onnx, path, largest_batch, axes, target, options)

    with (
        patch("asapc.commands.compile.export_rivals", one_for_all),
        patch("asapc.timing.compare.time_blocks", for_a_moment),
        patch("asapc.backends.tensorrt.builder.build_engine", for_one),
    ):
        yield
