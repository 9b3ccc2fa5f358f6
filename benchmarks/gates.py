"""How often `asapc check` alarms where nothing changed, and how often it does where something did.

    python -m benchmarks.gates                      # what is missing: about 75 minutes, on a machine that is quiet
    python -m benchmarks.gates --repetitions 2      # a try
    python -m benchmarks.gates --only 'A/A*'        # kinds by name, as in a shell

Every repetition runs `check_folder` with fresh sessions on the shipped model at batch 1, on the quiet machine and
beside another repetition, which keeps a second core busy. Intervals of a ratio are also taken beside a process that
does nothing but keep a core busy: another repetition competes for caches too, which changes the ratio itself.

The model is truncated Sinkhorn of BASE half-steps. Slower ones have more: those whose time, as measured on the quiet
machine, is nearest 10 % and 5 % above. Results are written after each repetition, so that a run may be stopped and goes
on where it was; at its end what stands in docs/ci.md between the two markers is written too.
"""

import argparse
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from functools import partial
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
import torch

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands.check import check_folder
from asapc.commands.compile import compile_model
from asapc.commands.folders import Folder
from asapc.commands.gates import CheckOptions
from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.errors import UnstableError
from asapc.hashes import sha256
from asapc.planning.operators import exact_operator
from asapc.timing.blocks import Effort
from asapc.timing.compare import compare
from asapc.types.interface import Interface
from asapc.version import __version__
from asapc.writing.environment import environment
from asapc.writing.folder import MANIFEST, write_json, write_manifest
from asapc.writing.rewrite import export_rivals
from benchmarks.generated import replace_generated

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "models" / "digits.pt"
CACHE = ROOT / "benchmarks" / "cache" / "gates"
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "gates.json", ROOT / "docs" / "ci.md"
BATCH = 1
BASE, MOST, EXACT = 20, 30, 40  # half-steps
SECONDS = 30.0  # the most for one check
REPETITIONS = 100
TRUTH = Effort(20.0, blocks=40)  # for a ratio on the quiet machine
QUIET = 0.005  # noise floor above which a machine is not quiet, and such a ratio is taken again
INTERVAL = Effort(4.0, blocks=8)  # for one whose interval is held to that
CONFIG = CompileConfig(threads=1, fidelity=("agreement>=0",))  # only latency is at stake here
Row = dict[str, Any]


def main() -> None:
    """Run what is missing, and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of each kind")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="kinds of repetitions, as in a shell")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}

    def save() -> None:
        partial_file = options.results.with_suffix(".partial")
        partial_file.write_text(json.dumps({**results, "environment": environment(seed=0)}) + "\n")
        partial_file.rename(options.results)

    folders = make_folders()
    truths = results.setdefault("true_ratios", {})
    for name, folder in folders.items():
        while name != "base" and truths.get(name, {"floor": inf})["floor"] > QUIET:
            truths[name] = measure_ratio(folder, folders["base"], TRUTH, seed=0)
            print(f"{name}: {truths[name]['value']:.4f} times the time of the base", flush=True)
            save()
    slower = results.setdefault("slower", {})  # by which rows were named that are there
    for share, gain in (("10%", 0.1), ("5%", 0.05)):
        slower.setdefault(share, nearest(truths, 1 + gain))
    relative = partial(check_relative, folders["base"])
    kinds: dict[str, Callable[[int], Row]] = {
        "A/A relative": partial(relative, folders["twin"]),
        "A/A baseline": partial(check_baseline, folders["base"]),
        **{f"A/B {share}": partial(relative, folders[name]) for share, name in slower.items()},
        "coverage": partial(measure_ratio, folders["exact"], folders["base"], INTERVAL),
    }
    kinds = {kind: repeat for kind, repeat in kinds.items() if fnmatch(kind, options.only)}
    # The interval of a quiet ratio is what busy ones are held to, and not held to anything itself.
    checks, intervals = ([kind for kind in kinds if (kind == "coverage") is of] for of in (False, True))
    machines = {"quiet": (checks, 1, nullcontext), "busy": ([*checks, *intervals], 2, nullcontext)}
    machines["spinning"] = (intervals, 1, spinning_process)
    for machine, (of_machine, processes, beside) in machines.items():
        rows = results.setdefault(machine, {})
        with beside(), ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            jobs = [
                (kind, pool.submit(timed, kinds[kind], seed))
                for kind in of_machine
                for seed in range(len(rows.setdefault(kind, [])), options.repetitions)
            ]
            for kind, job in jobs:
                rows[kind].append(job.result())
                save()
        for kind in of_machine:
            print(f"{machine:8} {kind:13} {summary(rows[kind], truths['exact']['value'])}", flush=True)
    replace_generated(DOCUMENT, table(results))


def make_folders() -> dict[str, Path]:
    """Make what is missing of the folders that are compared; "twin" is "base" with another graph of the same work."""
    names = {"base": BASE, "exact": EXACT, **{f"steps {n}": n for n in range(BASE + 1, MOST + 1)}}
    folders = {name: CACHE / name.replace(" ", "") for name in (*names, "twin")}
    if all(folder.exists() for folder in folders.values()):
        return folders
    CACHE.mkdir(parents=True, exist_ok=True)
    compiled = CACHE / "compiled"
    if not compiled.exists():
        options = {"level": 1, "target": "onnx", "batches": (BATCH,), "seconds": 1.0, "threads": 1}
        compile_model(SHIPPED, CompileConfig(out=compiled, **options))
    teacher = study(SHIPPED)
    modules = {name: {s.name: exact_operator(s, steps) for s in teacher.sites} for name, steps in names.items()}
    files = CACHE / "files"
    files.mkdir(exist_ok=True)
    export_rivals(teacher, modules, 1, files, lambda detail: print(detail, flush=True))
    model = onnx.load(str(files / "base.onnx"))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "samples"  # another graph, and the same work
    onnx.save(model, str(files / "twin.onnx"))
    for name, folder in folders.items():
        replace_model(compiled, files / f"{name}.onnx", folder)
    return folders


def replace_model(compiled: Path, model: Path, folder: Path) -> None:
    """Copy a compiled folder with another model in it; report and manifest fit."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(compiled, folder)
    shutil.copy(model, folder / "model.onnx")
    report = json.loads((folder / "report.json").read_text())
    for artifact in report["artifacts"]:
        artifact["sha256"] = sha256(folder / artifact["path"])
    write_json(folder / "report.json", report)
    manifest = folder / MANIFEST
    interface = Interface.of(json.loads(manifest.read_text()))
    manifest.unlink()  # it does not list itself
    write_manifest(folder, report["model"]["sha256"], __version__, interface)


def measure_ratio(folder: Path, other: Path, effort: Effort, seed: int) -> Row:
    """Return the ratio of two models' times with its interval."""
    own, base = Folder.at(folder), Folder.at(other)
    models = {name: partial(OnnxRuntimeRunner, of.model, 1) for name, of in (("base", base), ("own", own))}
    latency, _ = compare(models, {}, own.samples(None), BATCH, Effort(effort.seconds, effort.blocks, seed=seed))
    ratio = latency.ratios["own"]
    return {
        "value": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "floor": latency.floor,
        "stable": latency.stable,
    }


def timed(repeat: Callable[[int], Row], seed: int) -> Row:
    """Return the row of one repetition, and how long it took."""
    start = time.perf_counter()
    row = repeat(seed)
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def check_relative(base: Path, folder: Path, seed: int) -> Row:
    """Check a folder beside another."""
    return row_of(check_folder(folder, CheckOptions(relative=base, seconds=SECONDS), with_seed(seed)).data())


def check_baseline(folder: Path, seed: int) -> Row:
    """Check a folder by a baseline of itself, which the first repetition takes."""
    path = CACHE / "baseline.json"
    try:
        if not path.exists():
            check_folder(folder, CheckOptions(save=path, seconds=SECONDS), with_seed(seed))
        return row_of(check_folder(folder, CheckOptions(baseline=path, seconds=SECONDS), with_seed(seed)).data())
    except UnstableError as error:
        return {"outcome": "unstable", "reason": str(error)}


def with_seed(seed: int) -> CompileConfig:
    """Return the options of one repetition."""
    return CompileConfig(threads=CONFIG.threads, fidelity=CONFIG.fidelity, seed=seed)


def row_of(data: Mapping[str, Any]) -> Row:
    """Return what is kept of a check."""
    (gate,) = data["gates"]
    slowdown = {key: round(gate["slowdown"][key], 5) for key in ("value", "low", "high")}
    kept = {key: gate[key] for key in ("outcome", "noise_floor", "p", "blocks")}
    return {**kept, **slowdown, "others": data["conditions"]["busy_cores_of_others"]}


def nearest(truths: Mapping[str, Row], ratio: float) -> str:
    """Return the slower model whose time is nearest to so many times the base's."""
    steps = [name for name in truths if name.startswith("steps")]
    return min(steps, key=lambda name: abs(truths[name]["value"] - ratio))


def summary(rows: Sequence[Row], truth: float) -> str:
    """Return counts of outcomes, or how many intervals cover the truth, and how long a repetition took at most."""
    longest = max(row["seconds"] for row in rows)
    if "outcome" in rows[0]:
        counts = Counter(row["outcome"] for row in rows)
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    else:
        told = f"{sum(row['low'] <= truth <= row['high'] for row in rows)} intervals cover {truth:.4f}"
    return f"of {len(rows)}: {told}; {longest:.0f} s at most"


def table(results: Row) -> Iterator[str]:
    """Yield the lines of the table in the document."""
    truths, slower = results["true_ratios"], results["slower"]
    told = {
        "A/A relative": "the same work, `--relative`",
        "A/A baseline": "the same file, `--baseline`",
        **{f"A/B {share}": f"{truths[name]['value'] - 1:.1%} slower, `--relative`" for share, name in slower.items()},
        "coverage": f"interval of a ratio of {truths['exact']['value']:.2f}",
    }
    yield "| machine | compared | repetitions | outcomes | longest, s |"
    yield "|---|---|---:|---|---:|"
    for machine in ("quiet", "busy", "spinning"):
        for kind, rows in results.get(machine, {}).items():
            if not rows:
                continue  # not asked for yet
            outcomes, longest = summary(rows, truths["exact"]["value"]).partition(": ")[2].split("; ")
            yield f"| {machine} | {told[kind]} | {len(rows)} | {outcomes} | {longest.partition(' ')[0]} |"


@contextmanager
def spinning_process() -> Iterator[None]:
    """Keep one core busy with a process that touches no memory."""
    process = get_context("spawn").Process(target=spin, args=(os.getpid(),), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def spin(parent: int) -> None:
    """Do nothing, as fast as possible, for as long as the process that started this one lives."""
    while os.getppid() == parent:
        pass


if __name__ == "__main__":
    main()
