"""`asapc bench`: the latency of compiled folders and of rivals, side by side."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from asapc.commands.folders import Folder, Runtime, graph_hash, open_file
from asapc.commands.gates import rounded
from asapc.commands.study import study
from asapc.commands.target import cost_model
from asapc.commands.verify import same_loops, stored_selection
from asapc.config import CompileConfig
from asapc.errors import CheckpointError, OptionError
from asapc.events import OnEvent, stage
from asapc.loading.inputs import order_inputs
from asapc.loading.manifest import COMPILE
from asapc.loading.teacher import load_teacher
from asapc.planning.operators import rivals
from asapc.timing.blocks import Effort
from asapc.timing.compare import compare
from asapc.timing.machine import Watch, warn_of_load
from asapc.timing.rounds import repeated
from asapc.types.samples import Samples
from asapc.types.timing import BatchLatency, ratio_data
from asapc.writing.environment import environment
from asapc.writing.report import conditions_data
from asapc.writing.rewrite import export_rivals

RIVALS = ("teacher", "exact", "truncated", "softmax")
SECONDS = 10.0


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        against: names of RIVALS of the first folder, which its teacher is needed for.
        batches: empty for those at which the first folder was measured.
        lengths: of all axes that the models leave open, the batch apart; empty for that of the samples.
        threads: of the runtime; empty for one a core.
        runtimes: empty for all that are here.
        seconds: the most for each measurement.
        data: samples; None for those that the first folder keeps.
        teacher: the model that it was compiled from; None for the path that its report names.

    Raises:
        OptionError: there is no such rival.
    """

    against: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    runtimes: tuple[Runtime, ...] = ()
    seconds: float = SECONDS
    data: Path | None = None
    teacher: Path | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.against) - set(RIVALS):
            raise OptionError(f"--against cannot be {min(unknown)!r}", f"give some of {', '.join(RIVALS)}")


def bench_folders(
    paths: Sequence[Path],
    options: BenchOptions | None = None,
    config: CompileConfig | None = None,
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Measure compiled folders and rivals side by side: in turns, on the same samples, beside the first folder twice.

    Args:
        paths: what `compile_model` wrote, the one first that the others are compared with.
        options: what to measure.
        config: how to read the teacher, where rivals are asked for, and the seed.
        on_event: called with progress.

    Returns:
        What `asapc bench --json` prints, see docs/bench.schema.json.

    Raises:
        CheckpointError: a folder is not whole, or was not compiled from this teacher.
        SamplesError: samples do not fit the models, or none were kept.
        OptionError: a length where no axis is open, or two models of one name.
    """
    options, config = options or BenchOptions(), config or CompileConfig()
    names = [*map(str, paths), *dict.fromkeys(options.against)]
    if len(set(names)) < len(names):
        raise OptionError(
            f"two models are called {max(names, key=names.count)}",
            "name each folder once, and one that is called as a rival by its whole path",
        )
    folders = {str(path): Folder.at(path) for path in paths}
    first = next(iter(folders.values()))
    samples = first.samples(options.data)
    for folder in folders.values():
        folder.fit(samples)
    watch, measurements = Watch(), []
    with tempfile.TemporaryDirectory() as scratch:
        exported = export_those(options, first, samples, Path(scratch), config, on_event)
        with stage("measure", on_event) as step:
            for runtime in options.runtimes or present():
                files = {name: folder.deployed(runtime) for name, folder in folders.items()} | exported
                distinct, same = twins(files)
                for threads, length, batch in product(
                    options.threads or (torch.get_num_threads(),),
                    options.lengths or (None,),
                    options.batches or first.batches,
                ):
                    inputs = samples if length is None else lengthened(samples, first, length)
                    opener = partial(open_file, runtime=runtime, threads=threads, inputs=repeated(inputs, batch))
                    models = {name: partial(opener, path) for name, path in distinct.items()}
                    effort = Effort(options.seconds, seed=config.seed)
                    latency, times = compare(models, same, inputs, batch, effort, step.advance)
                    facts_ = {"runtime": runtime, "threads": threads, "length": length}
                    raw = {run.name: rounded(times[same.get(run.name, run.name)]) for run in latency.runs}
                    measurements.append({**facts_, **measurement_data(latency, raw)})
            step.summary = f"{len(folders) + len(exported)} models, {len(measurements)} measurements"
    return {
        "schema": "asapc.bench/1",
        "environment": environment(config.seed),
        "conditions": conditions_data(watch.conditions),
        "warnings": warn_of_load(watch.conditions),
        "first": str(first.path),
        "measurements": measurements,
    }


def present() -> tuple[Runtime, ...]:
    """Return the runtimes that this machine has."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def twins(files: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files of which each is another graph, and the names of the others with the name of their twin."""
    seen: dict[str, str] = {}
    names = {name: seen.setdefault(graph_hash(path), name) for name, path in files.items()}
    return (
        {name: files[name] for name, twin in names.items() if name == twin},
        {name: twin for name, twin in names.items() if name != twin},
    )


def lengthened(samples: Samples, folder: Folder, length: int) -> Samples:
    """Return samples of a length, cut off or repeated on all axes that the model leaves open, the batch apart.

    Raises:
        OptionError: none is open.
    """
    inputs = dict(samples.inputs)
    for name, kind in folder.inputs.items():
        for axis, size in enumerate(kind.sizes or ()):
            if axis > 0 and size is None:
                index = torch.arange(length) % inputs[name].shape[axis]
                inputs[name] = inputs[name].index_select(axis, index)
    if all(value is samples.inputs[name] for name, value in inputs.items()):
        raise OptionError(f"{folder.path} has no open axis but the batch", "omit --length, or compile with --dynamic")
    return Samples(inputs)


def export_those(
    options: BenchOptions, folder: Folder, samples: Samples, scratch: Path, config: CompileConfig, on_event: OnEvent
) -> dict[str, Path]:
    """Export the rivals of a folder that are asked for; the files by name.

    Raises:
        CheckpointError: the folder was not compiled from this teacher.
    """
    if not options.against:
        return {}
    report = folder.report
    loaded = load_teacher(folder.path, report, options.teacher, config)
    # A graph is captured with two samples or more.
    several = order_inputs(loaded, samples if len(samples) > 1 else samples[[0, 0]])
    teacher = study(loaded, config, lambda loaded, config: (several, several), on_event)
    if not same_loops(teacher.sites, report["sites"]):
        raise CheckpointError(
            f"the loops of {loaded.path} do not show on these samples as they did in calibration", COMPILE
        )
    selection = stored_selection(folder.path, report, teacher.sites)
    batch = max(options.batches or folder.batches)
    modules = rivals(teacher.sites, selection, batch, cost_model(config), config.wanted_lowering)
    with stage("export", on_event) as step:
        runners = export_rivals(teacher, {n: modules[n] for n in options.against}, 1, scratch, step.advance)
        step.summary = ", ".join(runners)
    return {name: runner.path for name, runner in runners.items()}


def measurement_data(latency: BatchLatency, raw: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """Return one measurement: a row for each model, with its raw times and the ratio of its time to the first's."""
    rows = []
    for run in latency.runs:
        row = {key: value for key, value in asdict(run).items() if key not in ("batch", "runtime", "device")}
        ratio = latency.ratios.get(run.name)
        rows.append({**row, "ratio": None if ratio is None else ratio_data(ratio), "ms": raw[run.name]})
    return {
        "batch": latency.batch,
        "blocks": latency.blocks,
        "noise_floor": latency.floor,
        "stable": latency.stable,
        "warnings": list(latency.warnings),
        "rows": rows,
    }
