"""What public models take with the exact form of their loops, beside the loops as written, both in ONNX Runtime.

    python -m benchmarks.hub            # a quarter of an hour
    python -m benchmarks.hub --quick    # tiny models for a moment, to see that it runs; writes nothing

Hugging Face's SuperGlue and a block of a language model with manifold-constrained hyper-connections, both from
transformers, with random weights, compiled as with -O1. Run from the root of a checkout, with transformers installed.
Writes benchmarks/results/hub.json and what stands in docs/benchmarks.md between the two markers.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asapc.backends.base import Runner
from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.planning.choose import choose
from asapc.planning.costs import shipped
from asapc.planning.operators import operators
from asapc.timing.rounds import time_rounds
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.rewrite import export_rivals
from benchmarks.generated import replace_generated
from benchmarks.intervals import median_ratio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the models are the tests' own

from helpers import hub_models  # noqa: E402

RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "hub.json", ROOT / "docs" / "benchmarks.md"
SECONDS, MIN_ROUNDS, SAMPLES, SEED, RESAMPLES = 60.0, 30, 16, 0, 9999
LOOP, COMPILED = "loop", "compiled"


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how many samples a call takes.

    Attributes:
        name: what the table calls it.
        build: returns the model.
        inputs: returns as many samples as it is told.
        batch: samples a call.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    batch: int


def matcher(keypoints: int, size: int = 256, layers: int = 18, batch: int = 1) -> Case:
    """Return SuperGlue, of its published size unless told otherwise."""
    return Case(
        f"SuperGlue, {keypoints} keypoints",
        lambda: hub_models.Matcher(size=size, layers=layers),
        lambda count: hub_models.matcher_inputs(count, keypoints, size),
        batch,
    )


def mixer(tokens: int, size: int = 1024, batch: int = 1) -> Case:
    """Return a block with hyper-connections."""
    return Case(
        f"hyper-connections, {tokens} tokens of {size}",
        lambda: hub_models.Mixer(size),
        lambda count: hub_models.mixer_inputs(count, tokens, size),
        batch,
    )


CASES = [matcher(128), mixer(128), mixer(1024), mixer(128, 256)]
QUICK_CASES = [matcher(24, 32, 2), mixer(16, 32)]


def main() -> None:
    """Measure all cases, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models for a moment; writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator; 1 by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases, seconds = (QUICK_CASES, 0.1) if options.quick else (CASES, SECONDS)
    rows = []
    for case in cases:
        rows.append(compare(case, seconds, options.threads))
        print(rows[-1], flush=True)
    lines = list(table(rows))
    print("\n".join(lines))
    if not options.quick:
        write_json(RESULTS, {"rows": rows, "threads": options.threads, "environment": environment(SEED)})
        replace_generated(DOCUMENT, lines)


def compare(case: Case, seconds: float, threads: int) -> dict[str, Any]:
    """Time a model with its loops as written and with the operators that -O1 chooses, by turns."""
    torch.manual_seed(SEED)
    samples = Samples(case.inputs(SAMPLES))
    teacher = study_module(case.build(), samples)
    modules = operators(teacher.sites, choose(teacher, CompileConfig(level=1), shipped()))
    assert len(modules) == len(teacher.sites) > 0, f"{case.name}: not all loops are replaced"
    with tempfile.TemporaryDirectory() as folder:
        runners = export_rivals(teacher, {LOOP: {}, COMPILED: modules}, threads, Path(folder), lambda detail: None)
    times = time_rounds(runners, samples, case.batch, seconds, SEED, MIN_ROUNDS)
    ratio, low, high = median_ratio(times[COMPILED], times[LOOP], SEED, RESAMPLES)
    return {
        "model": case.name,
        "batch": case.batch,
        "sites": {site.name: [site.loop.half_steps, site.loop.queries, site.loop.keys] for site in teacher.sites},
        "operators": {name: type(module).__name__ for name, module in modules.items()},
        "share": sum(site.share for site in teacher.sites),
        "loop_ms": float(np.median(times[LOOP])),
        "compiled_ms": float(np.median(times[COMPILED])),
        "ratio": ratio,
        "interval": [low, high],
        "rounds": len(times[LOOP]),
        "difference": difference(runners, samples),
    }


def difference(runners: dict[str, Runner], samples: Samples) -> float:
    """Return the largest relative difference of the outputs that are no indices."""
    pairs = zip(runners[COMPILED](samples), runners[LOOP](samples), strict=True)
    floating = [(compiled, loop) for compiled, loop in pairs if loop.is_floating_point()]
    return max(float((compiled - loop).norm() / loop.norm()) for compiled, loop in floating)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table in the document."""
    yield "| model | batch | half-steps | loop, ms | compiled, ms | compiled / loop (95%) | outputs differ by |"
    yield "|---|---:|---:|---:|---:|---|---:|"
    for row in rows:
        steps = ", ".join(str(half_steps) for half_steps, *_ in row["sites"].values())
        low, high = row["interval"]
        yield (
            f"| {row['model']} | {row['batch']} | {steps} | {row['loop_ms']:.2f} | {row['compiled_ms']:.2f} | "
            f"{row['ratio']:.3f} ({low:.3f} to {high:.3f}) | {row['difference']:.0e} |"
        )


if __name__ == "__main__":
    main()
