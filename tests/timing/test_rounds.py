"""Latency: runners take turns on the same inputs. A clock of our own, so that no test depends on a timing."""

from types import SimpleNamespace

import pytest
import torch

from asapc.timing import rounds as module
from asapc.timing.rounds import MIN_ROUNDS, WARM_UP_CALLS, measure, summarise, time_rounds
from asapc.types.samples import Samples

SAMPLES = Samples({"x": torch.arange(3.0)})


class Clock:
    """Stands for the module `time`: moves only when somebody calls a runner."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeRunner:
    """Takes the given seconds a call, and notes its calls in a log that all runners share."""

    runtime = "fake"

    def __init__(self, name: str, log: list, clock: Clock, seconds: float) -> None:
        self.name, self.log, self.clock, self.seconds = name, log, clock, seconds

    def __call__(self, samples: Samples) -> list[torch.Tensor]:
        self.log.append((self.name, samples.inputs["x"].tolist()))
        self.clock.now += self.seconds
        return []


@pytest.fixture
def lab(monkeypatch):
    """Three runners of 1, 2 and 4 ms, their common log, and the clock."""
    clock, log = Clock(), []
    monkeypatch.setattr(module, "time", clock)
    runners = {name: FakeRunner(name, log, clock, ms / 1000) for name, ms in (("a", 1), ("b", 2), ("c", 4))}
    return SimpleNamespace(clock=clock, log=log, runners=runners)


def rounds(log: list) -> list[tuple[str, ...]]:
    """The calls after the warm-up, three at a time."""
    names = [name for name, _ in log][3 * WARM_UP_CALLS :]
    return [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]


def test_every_round_calls_every_runner_once(lab):
    measure(lab.runners, SAMPLES, batch=2, seconds=0.1)
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds(lab.log))


def test_the_order_within_the_rounds_varies(lab):
    measure(lab.runners, SAMPLES, batch=2, seconds=0.1)
    assert len(set(rounds(lab.log))) > 1
    assert {each[0] for each in rounds(lab.log)} == {"a", "b", "c"}  # nobody always goes first


def test_the_order_follows_from_the_seed(lab):
    orders = []
    for seed in (0, 0, 1):
        lab.log.clear()
        measure(lab.runners, SAMPLES, batch=2, seconds=0.1, seed=seed)
        orders.append(rounds(lab.log))
    assert orders[0] == orders[1] != orders[2]


def test_every_runner_is_warmed_up_before_anything_is_timed(lab):
    runs = measure(lab.runners, SAMPLES, batch=2, seconds=0.0)
    warm_up = [name for name, _ in lab.log][: 3 * WARM_UP_CALLS]
    assert sorted(warm_up) == sorted(["a", "b", "c"] * WARM_UP_CALLS)
    assert [run.samples for run in runs] == [MIN_ROUNDS] * 3


def test_the_time_to_spend_decides_the_rounds_beyond_the_fewest(lab):
    runs = measure(lab.runners, SAMPLES, batch=2, seconds=0.7)  # 7 ms a round
    assert all(99 <= run.samples <= 101 for run in runs)


def test_times_are_milliseconds_of_a_call(lab):
    runs = measure(lab.runners, SAMPLES, batch=2, seconds=0.0)
    assert [(run.name, run.runtime, run.batch) for run in runs] == [(n, "fake", 2) for n in "abc"]
    for run, milliseconds in zip(runs, (1, 2, 4), strict=True):
        assert (run.p50_ms, run.p90_ms, run.mean_ms) == pytest.approx([milliseconds] * 3)
        assert run.std_ms == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("batch", "expected"), [(1, [0]), (3, [0, 1, 2]), (7, [0, 1, 2, 0, 1, 2, 0])])
def test_all_runners_get_the_same_batch_of_samples_repeated_where_there_are_too_few(batch, expected, lab):
    measure(lab.runners, SAMPLES, batch, seconds=0.0)
    assert all(inputs == expected for _, inputs in lab.log)


def test_percentiles_are_those_of_the_times():
    run = summarise("a", "fake", 1, [float(ms) for ms in range(100, 0, -1)])
    assert (run.p50_ms, run.p90_ms, run.p99_ms) == pytest.approx((50.5, 90.1, 99.01))
    assert run.mean_ms == pytest.approx(50.5)
    assert run.std_ms == pytest.approx((9999 / 12) ** 0.5)  # of the uniform distribution on 1 to 100
    assert run.samples == 100


def test_a_percentile_takes_as_many_times_as_it_needs():
    few, some, many = (summarise("a", "fake", 1, [1.0] * count) for count in (9, 99, 100))
    assert (few.p90_ms, few.p99_ms, some.p90_ms, some.p99_ms, many.p99_ms) == (None, None, 1.0, None, 1.0)


def test_a_runner_with_a_clock_of_its_own_is_asked_for_the_time(lab):
    lab.runners["a"].time = lambda inputs: 7.0
    times = time_rounds(lab.runners, SAMPLES, batch=2, seconds=0.0)
    assert times["a"] == [7.0] * MIN_ROUNDS
    assert times["b"] == pytest.approx([2.0] * MIN_ROUNDS)
