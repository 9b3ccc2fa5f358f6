"""Holds the latency of a compiled folder to a baseline or to another folder, for `asapc check`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from asapc.backends.onnxruntime.library import library
from asapc.commands.folders import Folder, Runtime, graph_hash, open_file
from asapc.commands.reference import pack_reference, reference_file
from asapc.errors import NotComparableError, OptionError, UnstableError
from asapc.events import Stage
from asapc.loading.baseline import SAVE, SCHEMA, digest
from asapc.loading.manifest import HALF
from asapc.timing.blocks import AGAIN, Effort, Open, Settled, Times, time_blocks
from asapc.timing.gate import (
    BASE,
    HEAD,
    REFERENCE,
    baseline_gate,
    baseline_slowdown,
    identical_gate,
    narrow_enough,
    relative_gate,
    relative_slowdown,
    scaled_spread,
)
from asapc.timing.ratios import half_width
from asapc.timing.rounds import repeated
from asapc.types.samples import Samples
from asapc.types.timing import Conditions, Gate, Ratio
from asapc.version import __version__
from asapc.writing.environment import environment
from asapc.writing.report import conditions_data

MAX_SLOWDOWN = 0.03  # where none is given; intervals of half of it take some seconds on a quiet machine
SECONDS = 25.0  # for each batch size; a quiet machine needs a few
MIN_BLOCKS = 8
BASELINE = 0.5  # times as well known as a check has to be, which holds its own times to it
DIGITS = 6  # of a time in a baseline


@dataclass(frozen=True)
class CheckOptions:
    """What a check is told.

    Attributes:
        baseline: file of times to hold the latency to.
        relative: folder to hold it to instead, by turns on this machine.
        save: file to write times to.
        max_slowdown: how much slower than the other the model may be, as a share.
        batches: empty for those of the baseline, or those at which the folder was measured.
        seconds: the most to measure a batch size.
        data: samples; None for those that the folder keeps.
        teacher: the model that was compiled; matters with `data`.
        runtime: where to measure.

    Raises:
        OptionError: two things to compare with, a baseline to be written beside either, or a slowdown that is no share.
    """

    baseline: Path | None = None
    relative: Path | None = None
    save: Path | None = None
    max_slowdown: float = MAX_SLOWDOWN
    batches: tuple[int, ...] = ()
    seconds: float = SECONDS
    data: Path | None = None
    teacher: Path | None = None
    runtime: Runtime = "cpu"
    blocks: int = field(default=MIN_BLOCKS, repr=False)

    def __post_init__(self) -> None:
        if self.baseline is not None and self.relative is not None:
            raise OptionError("there are two things to compare with", "give --baseline or --relative")
        if self.save is not None and (self.baseline is not None or self.relative is not None):
            # Times that a gate refuses would become what the next check is held to.
            raise OptionError(
                "a baseline is taken of a model that is held to no other", "omit --save-baseline, or give it alone"
            )
        if not 0 < self.max_slowdown < 10:
            raise OptionError(
                f"--max-slowdown cannot be {self.max_slowdown:.0%}", "give a share above 0, such as 3% or 0.03"
            )


def parse_share(text: str) -> float:
    """Read a share, "3%" or "0.03".

    Raises:
        OptionError: it is none, or could be either.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if rest or not value >= 0:
        raise OptionError(f"cannot read the share {text!r}", "give per cent, 3%, or a number, 0.03")
    if value >= 1 and not percent:  # 3 is more likely 3% than three times the time
        raise OptionError(
            f"cannot tell whether the share {text!r} is per cent", f"give {text.strip()}%, or a number below 1"
        )
    return value / 100 if percent else value


@dataclass(eq=False)
class Measurement:
    """Measures a folder for a gate.

    Attributes:
        folder: that is measured.
        samples: to measure on.
        threads: of the runtime.
        options: of the check.
        seed: of all orders.
        step: to report progress to.
        times: raw times by batch size, as far as measured.
    """

    folder: Folder
    samples: Samples
    threads: int
    options: CheckOptions
    seed: int
    step: Stage
    times: dict[int, Times] = field(default_factory=dict)

    def relative(self, other: Folder) -> list[Gate]:
        """Hold the folder to another, by turns."""
        limit = self.options.max_slowdown
        batches = self.options.batches or self.folder.batches
        if graph_hash(self.model) == graph_hash(base := other.deployed(self.options.runtime)):
            return [identical_gate(batch, limit) for batch in batches]
        settled = narrow_enough(limit, relative_slowdown)
        for batch in batches:
            self.times[batch] = self.take_turns({BASE: self.opener(base, batch)}, batch, settled)
        return [relative_gate(times, batch, limit) for batch, times in self.times.items()]

    def alone(self, baseline: Mapping[str, Any] | None) -> list[Gate]:
        """Hold the folder to a baseline; without one only measure it, for the next.

        Raises:
            NotComparableError: the baseline lacks a batch size.
            UnstableError: times vary too much for a baseline.
        """
        limit = self.options.max_slowdown
        earlier = {} if baseline is None else {run["batch"]: run for run in baseline["runs"]}
        batches = self.options.batches or tuple(earlier) or self.folder.batches
        if earlier and (missing := set(batches) - earlier.keys()):
            raise NotComparableError(
                f"{self.options.baseline} has no times at batch {min(missing)}",
                f"give --batch {', '.join(map(str, earlier))}, or write a new one with --save-baseline",
            )
        gates = []
        with reference_file(self.model, self.options.baseline, baseline) as reference:
            for batch in batches:
                then = None if baseline is None else {n: np.array(blocks) for n, blocks in earlier[batch]["ms"].items()}
                spread = scaled_spread if then is None else baseline_slowdown(then)
                enough = narrow_enough(limit * BASELINE if then is None else limit, spread)
                times = self.take_turns({REFERENCE: self.opener(reference, batch)}, batch, enough)
                self.times[batch] = times
                if then is not None:
                    gates.append(baseline_gate(times, then, batch, limit))
                elif not narrow_enough(limit, spread)(times):
                    raise unfit(batch, scaled_spread(times))
        return gates

    @property
    def model(self) -> Path:
        """The file that is timed."""
        return self.folder.deployed(self.options.runtime)

    def opener(self, path: Path, batch: int) -> Open:
        """Return what opens sessions of an ONNX file for a batch."""
        return partial(open_file, path, self.options.runtime, self.threads, repeated(self.samples, batch))

    def take_turns(self, others: Mapping[str, Open], batch: int, settled: Settled) -> Times:
        """Time the model, the model opened again, and others."""
        own = self.opener(self.model, batch)
        effort = Effort(self.options.seconds, blocks=self.options.blocks, seed=self.seed)
        models = {HEAD: own, HEAD + AGAIN: own, **others}
        return time_blocks(models, self.samples, batch, effort, settled, self.step.advance)


def unfit(batch: int, spread: Ratio) -> UnstableError:
    """Return the error for times that are no baseline: later checks could not tell anything by them."""
    return UnstableError(
        f"latency is not stable enough for a baseline at batch {batch}: beside the same work with other weights it is "
        f"known to within {half_width(spread):.1%}",
        "measure on a quieter machine, or for longer with --seconds",
    )


def baseline_data(measurement: Measurement, conditions: Conditions) -> dict[str, Any]:
    """Return what a file of baselines holds, as docs/baseline.schema.json describes it."""
    runs = [
        {
            "batch": batch,
            "ms": {name: rounded(times[name]) for name in (HEAD, REFERENCE)},
        }
        for batch, times in measurement.times.items()
    ]
    content = {
        "schema": SCHEMA,
        "asapc": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(measurement.folder.path),
        "fingerprint": fingerprint(
            measurement.folder, measurement.samples, measurement.threads, measurement.options.runtime
        ),
        "conditions": conditions_data(conditions),
        "reference": pack_reference(measurement.model),
        "runs": runs,
    }
    return {**content, "sha256": digest(content)}


def rounded(times: Any) -> list[list[float]]:
    """Return raw times with as many digits as say something."""
    return [[float(f"{value:.{DIGITS}g}") for value in block] for block in times.tolist()]


def fingerprint(folder: Folder, samples: Samples, threads: int, runtime: Runtime) -> dict[str, str]:
    """Return what has to be the same for times of two moments to be comparable: machine, software, model, shapes."""
    facts: Any = environment(seed=0)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "cpu": facts["cpu"],
        "gpus": ", ".join(facts["gpus"]),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else "",
        "platform": facts["platform"],
        "onnxruntime": library().__version__,
        "runtime": runtime,
        "threads": str(threads),
        "model": folder.report["model"]["sha256"],
        "inputs": ", ".join(f"{name} {tuple(v.shape[1:])} {v.dtype}" for name, v in samples.inputs.items()),
        "precision": "float16" if folder.deployed(runtime).name == HALF else "float32",
    }


def compare_fingerprints(path: Path, baseline: Mapping[str, Any], own: Mapping[str, str]) -> None:
    """Raise NotComparableError where a baseline was taken of another model, or on another machine."""
    then = baseline["fingerprint"]
    differences = [
        f"{name} was {then.get(name, 'not told')!r}, and is {own.get(name, 'not told')!r}"
        for name in sorted({*then, *own})
        if then.get(name) != own.get(name)
    ]
    if differences:
        raise NotComparableError(
            f"{path} is not comparable: {'; '.join(differences)}",
            f"{SAVE}, on this machine and of this model, or compare two folders with --relative",
        )
