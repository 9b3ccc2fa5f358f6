"""Sinkhorn on many tiny matrices, as hyper-connections have one for each token: what their layouts gain.

    python -m benchmarks.tiny
    python -m benchmarks.tiny --quick    # a moment, writes nothing

The loop as written normalises (tokens, N, M) by sums over its axes, with a constant in every divisor. It is compared
with the general exact form, a matrix-vector product for each token and half-step, and with the two layouts that asapc
takes, packed and interleaved, all as ONNX files in ONNX Runtime. Ratios are medians of interleaved rounds in one
process, with 95 % intervals by bootstrap. Errors are against float64. Writes benchmarks/results/tiny.json and what
stands in docs/hyper-connections.md between the two markers.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.ops.guarded import GuardedSinkhorn
from asapc.ops.small import SmallSinkhorn
from asapc.timing.rounds import time_rounds
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Floor, Guard
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.generated import replace_generated
from benchmarks.intervals import median_ratio

ROOT = Path(__file__).resolve().parent
RESULTS, DOCUMENT = ROOT / "results" / "tiny.json", ROOT.parent / "docs" / "hyper-connections.md"
ITERATIONS, CONSTANT, SEED = 20, 1e-6, 0
FLOOR = Floor(CONSTANT, clamped=False)
GUARD = Guard(FLOOR, FLOOR, "plan", "plain", "one", "same")
TOKENS, SIZES = (1, 16, 512, 4096), ((2, 2), (4, 4), (4, 6), (8, 8))
SECONDS, MIN_ROUNDS, RESAMPLES = 3.0, 30, 999
WRITTEN, GENERAL, PACKED, INTERLEAVED = "as written", "general", "packed", "interleaved"


class AsWritten(nn.Module):
    """The loop of published hyper-connections: softmax, then columns and rows by turns."""

    def forward(self, scores: Tensor) -> Tensor:
        """Map scores (1, tokens, N, M) to plans of the same shape."""
        plan = scores.softmax(-1) + CONSTANT
        plan = plan / (plan.sum(-2, keepdim=True) + CONSTANT)
        for _ in range(ITERATIONS - 1):
            plan = plan / (plan.sum(-1, keepdim=True) + CONSTANT)
            plan = plan / (plan.sum(-2, keepdim=True) + CONSTANT)
        return plan


class Rewritten(nn.Module):
    """The same with an operator in the place of the loop, as the rewrite leaves it."""

    def __init__(self, operator: GuardedSinkhorn | SmallSinkhorn) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, scores: Tensor) -> Tensor:
        """Map scores (1, tokens, N, M) to plans of the same shape."""
        kernel = scores.softmax(-1) + CONSTANT
        if isinstance(self.operator, SmallSinkhorn):
            return self.operator.from_kernel(kernel)
        return self.operator(torch.log(kernel))


def forms(size: tuple[int, int]) -> dict[str, nn.Module]:
    """Return what is compared."""
    half_steps = 2 * ITERATIONS - 1  # the softmax is the teacher's own
    mass = torch.ones(1)
    return {
        WRITTEN: AsWritten(),
        GENERAL: Rewritten(GuardedSinkhorn(half_steps, "columns", GUARD, column_mass=mass)),
        PACKED: Rewritten(SmallSinkhorn(half_steps, "columns", size, GUARD, column_mass=mass)),
        INTERLEAVED: Rewritten(SmallSinkhorn(half_steps, "columns", size, GUARD, None, mass, "interleaved")),
    }


def main() -> None:
    """Measure all sizes, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens for a moment; writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator; 1 by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens, seconds = ((1, 16), 0.1) if options.quick else (TOKENS, SECONDS)
    rows = []
    for size in SIZES:
        for count in tokens:
            rows.append(compare(size, count, seconds, options.threads))
            print(rows[-1], flush=True)
    if not options.quick:
        write_json(RESULTS, {"rows": rows, "threads": options.threads, "environment": environment(SEED)})
        replace_generated(DOCUMENT, table(rows))


def compare(size: tuple[int, int], tokens: int, seconds: float, threads: int) -> dict[str, Any]:
    """Time all forms of one size of matrices at one number of tokens."""
    scores = 2 * torch.randn(2, tokens, *size, generator=torch.Generator().manual_seed(SEED))
    samples = Samples({"scores": scores})
    with tempfile.TemporaryDirectory() as folder:
        runners = {
            name: OnnxRuntimeRunner(
                export_onnx(
                    CapturedGraph(export(module.eval(), samples.inputs), samples), Path(folder) / "model.onnx", {}
                ).path,
                threads,
            )
            for name, module in forms(size).items()
        }
    times = time_rounds(runners, samples, 1, seconds, SEED, MIN_ROUNDS)
    with torch.no_grad():
        expected = AsWritten()(scores[:1].double())
    row: dict[str, Any] = {"size": list(size), "tokens": tokens, "rounds": len(times[WRITTEN])}
    row["ms"] = {name: float(np.median(ms)) for name, ms in times.items()}
    row["times_as_fast"] = {
        name: list(median_ratio(times[WRITTEN], times[name], SEED, RESAMPLES)) for name in runners if name != WRITTEN
    }
    row["largest_error"] = {
        name: float((runner(samples[:1])[0].double() - expected).abs().max()) for name, runner in runners.items()
    }
    return row


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table in the document."""
    yield "| matrices | tokens | as written, ms | general, times as fast | packed (95%) | interleaved (95%) | error |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        cells = [
            f"{ratio:.1f} ({low:.1f} to {high:.1f})"
            for ratio, low, high in map(row["times_as_fast"].__getitem__, (PACKED, INTERLEAVED))
        ]
        error = max(row["largest_error"][name] for name in (PACKED, INTERLEAVED))
        yield (
            f"| {row['size'][0]} x {row['size'][1]} | {row['tokens']:,} | {row['ms'][WRITTEN]:.3f} | "
            f"{row['times_as_fast'][GENERAL][0]:.2f} | {' | '.join(cells)} | {error:.0e} |"
        )


if __name__ == "__main__":
    main()
