"""The study's runner and its tables, with parts that are made up."""

import argparse
import copy
import json
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.study import __main__ as runner
from benchmarks.study import running, swaps
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


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Let threads take the place of processes, which take long to start."""
    monkeypatch.setattr(running, "ProcessPoolExecutor", lambda processes, *of_processes: ThreadPoolExecutor(processes))


def made_up(**cases: Callable[[], Any]) -> SimpleNamespace:
    """Return a part of such cases."""
    return SimpleNamespace(cases=lambda quick: cases, section=lambda rows: iter(["## Made up", *rows]))


def measured(results: Path, before: dict) -> dict:
    """Measure what is missing, and return what was written."""
    runner.measure(copy.deepcopy(before), results, argparse.Namespace(only="swaps", quick=True, processes=1))
    return json.loads(results.read_text())


def test_a_study_that_was_stopped_goes_on_where_it_was(monkeypatch, tmp_path):
    results = tmp_path / "study.json"

    def stop() -> None:
        while not results.exists():  # the first case was written
            time.sleep(0.01)
        raise ValueError("stopped")

    monkeypatch.setattr(runner, "PARTS", {"swaps": made_up(one=partial(dict, n=1), two=stop)})
    with pytest.raises(ValueError, match="stopped"):
        measured(results, {"parts": {}, "seconds": 0.0})
    stopped = json.loads(results.read_text())
    assert stopped["parts"] == {"swaps": {"one": {"n": 1}}}
    monkeypatch.setattr(runner, "PARTS", {"swaps": made_up(one=partial(int, "again"), two=partial(dict, n=2))})
    whole = measured(results, stopped)
    assert whole["parts"] == {"swaps": {"one": {"n": 1}, "two": {"n": 2}}}
    assert whole["seconds"] > stopped["seconds"] > 0
    assert list(runner.page(whole["parts"], ""))[-3:] == ["## Made up", "one", "two"]


@pytest.mark.parametrize("quick", [True, False])
def test_every_case_can_be_sent_to_a_process(quick):
    for part in runner.PARTS.values():
        pickle.dumps(part.cases(quick))
    pickle.dumps((runner.trainings(quick), runner.downstream.plans(quick)))


def test_cases_of_both_lanes_keep_their_order(monkeypatch, tmp_path):
    timed, other = ({f"{kind} {n}": partial(dict, n=n) for n in range(3)} for kind in ("timed", "other"))
    parts = {"swaps": made_up(**other), "frozen": made_up(**timed)}
    monkeypatch.setattr(runner, "PARTS", parts)
    monkeypatch.setattr(runner, "trainings", lambda quick: {})
    monkeypatch.setattr(runner.downstream, "plans", lambda quick: {})
    kept = {"parts": {"swaps": {"other 1": {"n": "kept"}}}, "seconds": 0.0}
    results, options = tmp_path / "study.json", argparse.Namespace(only=None, quick=True, processes=2)
    runner.measure(kept, results, options)
    written = json.loads(results.read_text())["parts"]
    assert {name: list(of_part) for name, of_part in written.items()} == {"swaps": list(other), "frozen": list(timed)}
    assert [row["n"] for row in written["swaps"].values()] == [0, "kept", 2]


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
        swaps.SOFTMAX: {"softmax": {swaps.AS_IS: 0.9}, "hinges": {swaps.AS_IS: 0.3, swaps.MAP: 0.4}},
        swaps.SINKHORN: {"sinkhorn": {swaps.AS_IS: 0.95}},
    }
    lines = list(swaps.lines({"digits, seed 0": row}))
    assert lines == [
        ["digits", "softmax", "softmax", "90.0", "", "", ""],
        ["digits", "softmax", "hinges", "30.0", "", "40.0", ""],
        ["digits", "sinkhorn", "sinkhorn", "95.0", "", "", ""],
    ]


def test_cells():
    assert (spread([]), spread([1.234]), spread([1.0, 3.0])) == ("", "1.23", "2.00 ± 1.41")
    assert (spread([0.0]), spread([1e-7]), spread([123.4, 125.0])) == ("0.00", "1.0e-07", "124 ± 1")
    assert (percent([]), percent([0.5]), percent([0.4, 0.6])) == ("", "50.0", "50.0 ± 14.1")
