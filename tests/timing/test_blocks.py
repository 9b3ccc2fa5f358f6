"""Blocks of fresh sessions, with runners and a clock of our own, so that no test depends on a timing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asapc.timing import blocks as module
from asapc.timing import rounds as rounds_module
from asapc.timing.blocks import MAX_ROUNDS, MIN_ROUNDS, Effort, save_times, time_blocks
from asapc.timing.compare import compare
from asapc.timing.rounds import WARM_UP_CALLS
from asapc.types.samples import Samples

SAMPLES = Samples({"x": torch.arange(3.0)})


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def lab(monkeypatch):
    """What opens models that take the given seconds a call and 10 ms to open, and a log of what was opened."""
    clock, opened = Clock(), []
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(rounds_module, "time", clock)

    def opener(name: str, seconds: float, jitter: float = 0.0):
        draw = np.random.default_rng(0)

        class Model:
            runtime = "fake"

            def __init__(self):
                opened.append(name)
                clock.now += 0.01
                self.factor = np.exp(draw.normal(0, jitter))

            def __call__(self, samples):
                clock.now += seconds * self.factor
                return []

        return Model

    return SimpleNamespace(clock=clock, opened=opened, opener=opener)


def test_every_block_opens_every_model_anew_and_the_order_varies(lab):
    models = {"a": lab.opener("a", 0.001), "b": lab.opener("b", 0.002)}
    times = time_blocks(models, SAMPLES, 2, Effort(0.0, blocks=12))
    assert len(lab.opened) == 24
    pairs = {tuple(lab.opened[i : i + 2]) for i in range(0, 24, 2)}
    assert pairs == {("a", "b"), ("b", "a")}
    assert times["a"].shape == times["b"].shape == (12, MIN_ROUNDS)
    assert times["b"] == pytest.approx(np.full_like(times["b"], 2.0))


def test_rounds_last_as_long_as_opening_within_bounds_and_within_the_time(lab):
    def rounds(seconds: float, total: float) -> int:
        models = {"a": lab.opener("a", seconds)}
        return time_blocks(models, SAMPLES, 1, Effort(total, blocks=2), lambda times: True)["a"].shape[1]

    assert rounds(0.03, 100.0) == 6  # of 30 ms: 0.2 s
    assert rounds(1e-5, 100.0) == MAX_ROUNDS
    assert rounds(1.0, 100.0) == MIN_ROUNDS
    assert rounds(0.005, 0.2) < 40  # which 0.2 s would be


def test_it_goes_on_until_settled_or_time_is_up(lab):
    seen = []

    def settled(times):
        seen.append(len(times["a"]))
        return len(times["a"]) == 9

    models = {"a": lab.opener("a", 0.001)}
    assert len(time_blocks(models, SAMPLES, 1, Effort(1e9, blocks=5), settled)["a"]) == 9
    assert seen == [5, 6, 7, 8, 9]
    start = lab.clock.now
    time_blocks(models, SAMPLES, 1, Effort(2.0, blocks=5))
    assert 2.0 <= lab.clock.now - start < 2.5


def test_fixed_rounds_need_no_pilot(lab):
    calls = []
    models = {"a": lab.opener("a", 0.001)}
    time_blocks(models, SAMPLES, 1, Effort(0.0, blocks=2, rounds=4), advance=calls.append)
    assert lab.clock.now == pytest.approx(2 * (0.01 + 0.001 * (WARM_UP_CALLS + 4)))
    assert calls[-1] == "batch 1: 2 blocks of 4 rounds"


def test_models_that_are_the_same_graph_are_timed_once_and_named(lab):
    models = {name: lab.opener(name, ms / 1000) for name, ms in (("own", 2), ("other", 3))}
    latency, times = compare(models, {"twin": "own", "second": "other"}, SAMPLES, 1, Effort(5.0))
    assert set(lab.opened) == {"own", "other"}
    assert set(times) == {"own", "own again", "other"}
    assert latency.stable
    assert latency.blocks == 5
    assert latency.warnings == ()
    findings = {name: ratio.finding for name, ratio in latency.ratios.items()}
    assert findings == {"other": "slower", "twin": "identical", "second": "slower"}
    assert [run.name for run in latency.runs] == ["own", "other", "twin", "second"]


def test_what_is_noisy_is_said(lab):
    models = {name: lab.opener(name, 0.002, jitter=0.2) for name in ("own", "other")}
    latency, _ = compare(models, {}, SAMPLES, 1, Effort(3.0))
    assert not latency.stable
    assert any("time was up" in line for line in latency.warnings)
    assert any("two openings of the same file" in line for line in latency.warnings)


def test_raw_times_are_kept_by_batch_and_model(tmp_path):
    save_times(tmp_path / "latency.npz", {1: {"a": np.ones((2, 3))}, 32: {"a b": np.zeros((2, 3))}})
    arrays = np.load(tmp_path / "latency.npz")
    assert set(arrays) == {"1.a", "32.a b"}
    assert arrays["1.a"].shape == (2, 3)
