"""Measures latency: all runners interleaved in one process, so that drift of the machine affects them alike."""

import random
import time
from collections.abc import Mapping

import torch

from asapc.backends.base import Runner
from asapc.types.results import LatencyRun
from asapc.types.samples import Samples

WARM_UP_CALLS = 3  # the first calls allocate memory and choose kernels
MIN_ROUNDS = 10


def measure(
    runners: Mapping[str, Runner],
    samples: Samples,
    batch: int,
    seconds: float,
    seed: int = 0,
    rounds: int = MIN_ROUNDS,
) -> list[LatencyRun]:
    """Sum up what `time_rounds`, with the same arguments, measures: one result for each runner, milliseconds a call."""
    times = time_rounds(runners, samples, batch, seconds, seed, rounds)
    return [summarise(name, runners[name].runtime, batch, times[name]) for name in runners]


def time_rounds(
    runners: Mapping[str, Runner],
    samples: Samples,
    batch: int,
    seconds: float,
    seed: int = 0,
    rounds: int = MIN_ROUNDS,
) -> dict[str, list[float]]:
    """Time every runner on the same batch, in rounds of one call each, in a new random order each round.

    Args:
        runners: what to time, by name.
        samples: real inputs; repeated where there are fewer than `batch`.
        batch: samples a call.
        seconds: time to spend.
        seed: of the order within the rounds.
        rounds: the least number of rounds, however long they take.

    Returns:
        Milliseconds in each round, by the runner's name.
    """
    inputs = samples[[i % len(samples) for i in range(batch)]]
    for runner in runners.values():
        for _ in range(min(WARM_UP_CALLS, rounds)):
            runner(inputs)
    times: dict[str, list[float]] = {name: [] for name in runners}
    # A fixed order would let each runner always follow the same one, with the caches that it leaves.
    order, shuffle = list(runners), random.Random(seed).shuffle
    end = time.perf_counter() + seconds
    completed = 0
    while completed < rounds or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            times[name].append(time_once(runners[name], inputs))
        completed += 1
    return times


def time_once(runner: Runner, inputs: Samples) -> float:
    """Return the milliseconds of one call: on the GPU where a runner has a clock there, else until it returns."""
    if (on_device := getattr(runner, "time", None)) is not None:
        return float(on_device(inputs))
    start = time.perf_counter()
    runner(inputs)
    return 1e3 * (time.perf_counter() - start)


def summarise(name: str, runtime: str, batch: int, times: list[float]) -> LatencyRun:
    """Compute percentiles, mean and standard deviation of raw times in milliseconds."""
    raw = torch.tensor(times, dtype=torch.float64)
    p50, p90, p99 = raw.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    return LatencyRun(name, runtime, batch, p50, p90, p99, raw.mean().item(), raw.std(correction=0).item(), len(times))
