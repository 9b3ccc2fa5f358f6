"""What measuring latency finds out: frozen, and without logic of their own but to say what an interval says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from asapc.types.results import GpuLatency, LatencyRun

Finding = Literal["identical", "slower", "faster", "not significantly different"]
Outcome = Literal["passed", "regression", "unstable", "identical"]


@dataclass(frozen=True)
class Ratio:
    """How many times as long one model takes as another, with a 95 % interval.

    Attributes:
        value, low, high: the ratio and the ends of its interval; all 1 where the graphs are identical.
        identical: whether both are the same graph, which was not compared with itself.
    """

    value: float
    low: float
    high: float
    identical: bool = False

    def widened(self, floor: float) -> "Ratio":
        """Return the ratio with an interval that holds for another process or hour too.

        Args:
            floor: what a ratio of one file to itself may be off here.
        """
        return replace(self, low=self.low / (1 + floor), high=self.high * (1 + floor))

    @property
    def finding(self) -> Finding:
        """Say what the first model is beside the second."""
        if self.identical:
            return "identical"
        if self.low > 1:
            return "slower"
        return "faster" if self.high < 1 else "not significantly different"


IDENTICAL = Ratio(1.0, 1.0, 1.0, identical=True)


@dataclass(frozen=True)
class Conditions:
    """The machine while it was measured.

    Attributes:
        cores: that the process may run on, by number; empty where the system does not tell.
        load: its load average over a minute, as measuring began; None where there is none.
        others: how many cores other processes kept busy meanwhile; None where the system does not tell.
        megahertz: frequency of the CPU before and after, as the system reports it; empty where it does not.
    """

    cores: tuple[int, ...]
    load: float | None
    others: float | None
    megahertz: tuple[float, ...]


@dataclass(frozen=True)
class BatchLatency:
    """All variants at one batch size.

    Attributes:
        batch: samples a call.
        runs: one a variant.
        ratios: of each other variant's time to that of the compiled model, by name, their intervals widened by `floor`.
        floor: what a ratio of the compiled model to itself, opened twice, may be off.
        blocks: of fresh sessions.
        stable: whether the intervals became narrow before time was up.
        warnings: what says that the figures are noisy.
    """

    batch: int
    runs: tuple[LatencyRun, ...]
    ratios: Mapping[str, Ratio]
    floor: float
    blocks: int
    stable: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Latency:
    """Latency of all variants on one device, by interleaved runs.

    Attributes:
        device: its name.
        threads: of the runtime.
        batches: smallest first.
        conditions: of the machine.
        warnings: what they say against the figures.
        gpu: runs of the compiled model on a GPU; None without one.
    """

    device: str
    threads: int
    batches: tuple[BatchLatency, ...]
    conditions: Conditions
    warnings: tuple[str, ...] = ()
    gpu: GpuLatency | None = None


@dataclass(frozen=True)
class Gate:
    """The latency of a model held to that of another, at one batch size.

    Attributes:
        batch: samples a call.
        outcome: "regression" needs all of: a ratio above the limit, an interval above the noise floor, and a rank test
            on raw times. "unstable" where time was up before that could be told.
        reason: what was seen, in one sentence.
        slowdown: of the model's time to the other's.
        floor: what a ratio of the model to itself may be off.
        p: of the rank test that the model is no slower; None where nothing was timed.
        limit: the ratio less 1 that is allowed.
        milliseconds: the median a call, of the model and of the other.
        blocks: of fresh sessions.
    """

    batch: int
    outcome: Outcome
    reason: str
    slowdown: Ratio
    floor: float
    p: float | None
    limit: float
    milliseconds: tuple[float, float] | None
    blocks: int

    def data(self) -> dict[str, Any]:
        """Return it as JSON shows it."""
        return {
            "batch": self.batch,
            "outcome": self.outcome,
            "reason": self.reason,
            "slowdown": ratio_data(self.slowdown),
            "noise_floor": self.floor,
            "p": self.p,
            "max_slowdown": self.limit,
            "ms": None if self.milliseconds is None else self.milliseconds[0],
            "other_ms": None if self.milliseconds is None else self.milliseconds[1],
            "blocks": self.blocks,
        }


def ratio_data(ratio: Ratio) -> dict[str, Any]:
    """Return a ratio as JSON shows it."""
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high, "finding": ratio.finding}
