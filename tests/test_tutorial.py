"""The tutorial's code and commands are run in their order, in an empty folder."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

from helpers.documents import code_blocks, commands, quick_words, run, write_sources
from helpers.paths import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
LINES = [line for language, text in code_blocks(TUTORIAL) if language == "sh" for line in commands(text)]


def headers(text: str) -> list[list[str]]:
    """The heads of the columns of tables."""
    lines = text.splitlines()
    return [line.split() for line, rule in pairwise(lines) if rule.strip() and not rule.strip(" ─")]


def test_the_tutorial_leads_from_a_model_to_onnx_runtime(tmp_path: Path) -> None:
    write_sources(TUTORIAL, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"my_model.py", "train.py", "run.py"}
    printed, tables = "", list[list[str]]()
    for line in LINES:
        program, *words = shlex.split(line)
        printed = run(words if program == "python" else [*quick_words(), *words], tmp_path)
        tables += headers(printed)
    shown = [head for language, text in code_blocks(TUTORIAL) if not language for head in headers(text)]
    assert shown
    assert all(head in tables for head in shown), tables
    classes, labels = (re.findall(r"\d", line) for line in printed.splitlines())
    assert len(classes) == len(labels) == 10
    # A few seconds of training need not give the same weights on every machine.
    assert sum(a == b for a, b in zip(classes, labels, strict=True)) >= 8
    assert (tmp_path / "shapes.asap" / "report.json").is_file()
