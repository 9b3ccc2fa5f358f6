"""Times models in blocks of rounds, each on sessions opened anew.

A session keeps where in memory its weights and buffers came to lie, and may be some per cent faster or slower for all
of its life than another of the same file. More rounds do not average that out; more sessions do.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asapc.backends.base import Runner
from asapc.timing.rounds import WARM_UP_CALLS, repeated, time_rounds
from asapc.types.samples import Samples

# Milliseconds by the model's name: (blocks, rounds). What stands in the same place was timed in the same round.
Times = Mapping[str, NDArray[np.float64]]
Open = Callable[[], Runner]
Settled = Callable[[Times], bool]

MIN_BLOCKS = 5  # a bootstrap of fewer says little
MIN_ROUNDS, MAX_ROUNDS = 5, 200  # of a block
# A block's rounds last at least as long as opening its sessions does, or this many seconds.
MIN_SECONDS = 0.2
AGAIN = " again"  # follows the name of a model in the pair that is the same file opened twice


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: the most, unless `blocks` take longer.
        blocks: the least number of them, two or more.
        rounds: of a block; None for as many as `plan_rounds` says.
        seed: of all orders.
    """

    seconds: float
    blocks: int = MIN_BLOCKS
    rounds: int | None = None
    seed: int = 0


def time_blocks(
    models: Mapping[str, Open],
    samples: Samples,
    batch: int,
    effort: Effort,
    settled: Settled = lambda times: False,
    advance: Callable[[str], None] = lambda detail: None,
) -> Times:
    """Time models in turns, block by block, until the result is settled or time is up.

    Args:
        models: opens a session of each, by name.
        samples: real inputs; repeated where there are fewer than `batch`.
        batch: samples a call.
        effort: how long.
        settled: whether the times so far suffice; asked after each block from the least number on. It may look at how
            wide intervals are, but not at where they lie: whoever stops at a result that he likes finds it.
        advance: called with a line about the progress.
    """
    order, draw = list(models), random.Random(effort.seed)
    inputs = repeated(samples, batch)
    raw: dict[str, list[list[float]]] = {name: [] for name in models}
    rounds = effort.rounds
    times: Times = {}
    end = time.perf_counter() + effort.seconds
    for block in range(1, 10**6):
        draw.shuffle(order)
        start = time.perf_counter()
        runners = {name: models[name]() for name in order}
        if rounds is None:
            rounds = plan_rounds(runners, inputs, time.perf_counter() - start, end - start, effort.blocks)
        of_block = time_rounds(runners, inputs, batch, 0.0, draw.getrandbits(32), rounds)
        for name, milliseconds in of_block.items():
            raw[name].append(milliseconds)
        advance(f"batch {batch}: {block} blocks of {rounds} rounds")
        if block >= effort.blocks:
            times = {name: np.array(blocks) for name, blocks in raw.items()}
            if settled(times) or time.perf_counter() >= end:
                break
    return times


def plan_rounds(runners: Mapping[str, Runner], inputs: Samples, opening: float, seconds: float, blocks: int) -> int:
    """Return how many rounds a block takes, from what opening its sessions took and a round takes."""
    start = time.perf_counter()
    for runner in runners.values():
        for _ in range(WARM_UP_CALLS):
            runner(inputs)
    overhead = opening + time.perf_counter() - start
    start = time.perf_counter()
    time_rounds(runners, inputs, len(inputs), 0.0, rounds=1)  # which warms up with one call
    a_round = max((time.perf_counter() - start) / 2, 1e-6)
    worthwhile = max(overhead, MIN_SECONDS) / a_round
    affordable = (seconds / blocks - overhead) / a_round
    return int(min(max(min(worthwhile, affordable), MIN_ROUNDS), MAX_ROUNDS))


def save_times(path: Path, times: Mapping[int, Times]) -> None:
    """Write raw times, compressed: arrays "<batch>.<model>" of milliseconds, (blocks, rounds)."""
    arrays: dict[str, Any] = {
        f"{batch}.{name}": values for batch, of_batch in times.items() for name, values in of_batch.items()
    }
    np.savez_compressed(path, **arrays)
