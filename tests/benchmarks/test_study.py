"""The study's runner and its tables, with parts that are made up."""

import argparse
import json
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks.study import __main__ as runner
from benchmarks.study import swaps
from benchmarks.study.downstream import kept
from benchmarks.study.downstream import section as downstream_section
from benchmarks.study.summary import section as summary_section
from benchmarks.study.tables import percent, spread


def downstream_row(task: str, seed: int, teacher: float, compiled: float) -> dict:
    ratio = {"value": 2.0, "low": 1.9, "high": 2.1}
    times = dict.fromkeys(("teacher", "exact", "truncated", "softmax"), ratio)
    row = {"task": task, "seed": seed, "teacher": teacher, "softmax-trained": 0.5, "compiled": compiled}
    return {**row, "agreement": 0.99, "times": times}


ROWS = {
    "digits, seed 0": downstream_row("digits", 0, 0.9, 0.9),
    "digits, seed 1": downstream_row("digits", 1, 0.8, 0.76),
    "mails, seed 0": downstream_row("mails", 0, 0.5, 0.5),
}


def test_a_study_that_was_stopped_goes_on_where_it_was(monkeypatch, tmp_path):
    calls = []

    def run(name: str, stop: bool) -> dict:
        calls.append(name)
        if stop:
            raise KeyboardInterrupt
        return {"name": name}

    def part(stop: bool) -> SimpleNamespace:
        return SimpleNamespace(
            cases=lambda quick: {"one": lambda: run("one", False), "two": lambda: run("two", stop)},
            section=lambda rows: iter(["## Made up", *rows]),
        )

    results, options = tmp_path / "study.json", argparse.Namespace(only=None, quick=True, processes=1)
    rows: dict = {}
    monkeypatch.setattr(runner, "PARTS", {"made up": part(stop=True)})
    with pytest.raises(KeyboardInterrupt):
        runner.measure(rows, results, options)
    rows = json.loads(results.read_text())["parts"]
    assert rows == {"made up": {"one": {"name": "one"}}}
    monkeypatch.setattr(runner, "PARTS", {"made up": part(stop=False)})
    runner.measure(rows, results, options)
    assert calls == ["one", "two", "two"]
    assert list(runner.page(rows))[-3:] == ["## Made up", "one", "two"]


def test_what_is_not_timed_may_run_at_once_and_keeps_its_order(monkeypatch, tmp_path):
    cases = {name: partial(dict, name=name) for name in ("one", "two", "three")}
    part = SimpleNamespace(cases=lambda quick: cases)
    monkeypatch.setattr(runner, "PARTS", {"swaps": part})
    rows = {"swaps": {"two": {"name": "kept"}}}
    runner.measure(rows, tmp_path / "study.json", argparse.Namespace(only=None, quick=True, processes=2))
    written = json.loads((tmp_path / "study.json").read_text())["parts"]["swaps"]
    assert list(written.items()) == [(name, {"name": "kept" if name == "two" else name}) for name in cases]


def test_what_compiled_models_keep_is_a_mean_over_seeds_for_each_task():
    assert kept(ROWS) == pytest.approx([0.975, 1.0])
    lines = list(summary_section({"downstream": ROWS}))
    assert lines[2].endswith("| 0.988 |")
    assert lines[3].endswith("| 0.975 |")


def test_a_model_that_was_refused_is_said_to_be():
    refused = {"task": "mails", "seed": 1, "teacher": 0.5, "softmax-trained": 0.5, "refused": "agreement 0.4"}
    text = "\n".join(downstream_section({**ROWS, "mails, seed 1": refused}))
    assert "| mails | 2 | 50.0 ± 0.0 | 50.0 | 100.0 | 99.0 |" in text
    assert "mails, seed 1, was not compiled: agreement 0.4." in text


def test_swaps_have_a_line_for_what_each_model_has_now():
    row = {
        "task": "digits",
        "seed": 0,
        swaps.SOFTMAX: {"softmax": {swaps.AS_IS: 0.9}, "compiled": {swaps.AS_IS: 0.3, swaps.MAP: 0.4}},
        swaps.SINKHORN: {"sinkhorn": {swaps.AS_IS: 0.95}},
    }
    lines = list(swaps.lines({"digits, seed 0": row}))
    assert lines == [
        ["digits", "softmax", "softmax", "90.0", "", "", ""],
        ["digits", "softmax", "compiled", "30.0", "", "40.0", ""],
        ["digits", "sinkhorn", "sinkhorn", "95.0", "", "", ""],
    ]


def test_cells():
    assert (spread([]), spread([1.234]), spread([1.0, 3.0])) == ("", "1.23", "2.00 ± 1.41")
    assert (spread([0.0]), spread([1e-7]), spread([123.4, 125.0])) == ("0.00", "1.0e-07", "124 ± 1")
    assert (percent([]), percent([0.5]), percent([0.4, 0.6])) == ("", "50.0", "50.0 ± 14.1")
