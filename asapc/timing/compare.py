"""Measures models side by side at one batch size: times, ratios to the first of them, and what speaks against both."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from asapc.timing.blocks import AGAIN, Effort, Open, Times, time_blocks
from asapc.timing.ratios import half_width, noise_floor, paired_ratio
from asapc.timing.rounds import summarise
from asapc.types.samples import Samples
from asapc.types.timing import IDENTICAL, BatchLatency, Ratio

NARROW = 0.01  # half the width of an interval that is no longer worth time
NOISY = 0.02  # what a ratio of a file to itself may be off
UNSTEADY = 0.3  # coefficient of variation of the rounds of a block


def compare(
    models: Mapping[str, Open],
    same: Mapping[str, str],
    samples: Samples,
    batch: int,
    effort: Effort,
    advance: Callable[[str], None] = lambda detail: None,
) -> tuple[BatchLatency, Times]:
    """Measure models at one batch size, the first of them twice, until all ratios to it are narrow or time is up.

    Args:
        models: opens a session of each, by name; those that are the same graph as another are not among them.
        same: those, with the name of the other.
        samples: real inputs.
        batch: samples a call.
        effort: how long.
        advance: called with a line about the progress.

    Returns:
        What came of it, and the raw times, those of the repeated model among them.
    """
    first = next(iter(models))

    def ratios(times: Times) -> dict[str, Ratio]:
        return {name: paired_ratio(times[name], times[first], effort.seed) for name in models if name != first}

    def settled(times: Times) -> bool:
        pair = paired_ratio(times[first + AGAIN], times[first], effort.seed)
        return all(half_width(ratio) <= NARROW for ratio in (pair, *ratios(times).values()))

    pairs = {**models, first + AGAIN: models[first]}
    runtime = models[first]().runtime
    times = time_blocks(pairs, samples, batch, effort, settled, advance)
    floor, stable = noise_floor(times, first), settled(times)
    runs = tuple(summarise(n, runtime, batch, times[same.get(n, n)].ravel().tolist()) for n in (*models, *same))
    own = {name: ratio.widened(floor) for name, ratio in ratios(times).items()}
    twins = {name: IDENTICAL if other == first else own[other] for name, other in same.items()}
    warnings = tuple(doubts(times, first, floor, stable))
    return BatchLatency(batch, runs, {**own, **twins}, floor, len(times[first]), stable, warnings), times


def doubts(times: Times, first: str, floor: float, stable: bool) -> Sequence[str]:
    """Return what the times themselves say against their ratios."""
    found = []
    if not stable:
        found.append(f"time was up before all ratios were known to within {NARROW:.0%}")
    if floor > NOISY:
        found.append(f"two openings of the same file may differ by {floor:.1%} here")
    variation = float(np.median(times[first].std(axis=1) / times[first].mean(axis=1)))
    if variation > UNSTEADY:
        found.append(f"times of {first} vary by {variation:.0%} from call to call")
    return found
