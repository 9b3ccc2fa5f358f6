"""Times runners that take turns on the same batch, so that drift of the machine affects them alike."""

import random
import time
from collections.abc import Mapping, Sequence

import numpy as np

from asapc.backends.base import Runner
from asapc.types.results import LatencyRun
from asapc.types.samples import Samples

WARM_UP_CALLS = 3  # the first calls allocate memory and choose kernels
MIN_ROUNDS = 10
# A percentile of fewer times than these would be the largest of them, or a guess.
NEEDED = {90: 10, 99: 100}


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
    inputs = repeated(samples, batch)
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
            times[name].append(milliseconds(runners[name], inputs))
        completed += 1
    return times


def repeated(samples: Samples, batch: int) -> Samples:
    """Return a batch of samples, repeated where they are too few."""
    return samples[[i % len(samples) for i in range(batch)]]


def milliseconds(runner: Runner, inputs: Samples) -> float:
    """Time one call: by the device's own clock where a runner has one, as those on a GPU do."""
    if (own := getattr(runner, "time", None)) is not None:
        return float(own(inputs))
    start = time.perf_counter()
    runner(inputs)
    return 1e3 * (time.perf_counter() - start)


def summarise(name: str, runtime: str, batch: int, times: Sequence[float]) -> LatencyRun:
    """Compute percentiles, mean and standard deviation of raw times in milliseconds."""
    raw = np.asarray(times, dtype=np.float64).ravel()
    p90, p99 = (float(np.percentile(raw, q)) if raw.size >= needed else None for q, needed in NEEDED.items())
    p50, mean, std = (float(function(raw)) for function in (np.median, np.mean, np.std))
    return LatencyRun(name, runtime, batch, p50, p90, p99, mean, std, raw.size)
