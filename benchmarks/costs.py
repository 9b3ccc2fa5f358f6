"""Measures what operators cost in ONNX Runtime, and fits the model by which the planner compares them.

    python -m benchmarks.costs

Each operator runs alone, with the product that makes its scores, on random queries, keys and values; latencies are
medians of interleaved runs in one process. Milliseconds a unit of work (`asapc.planning.costs.work`) follow by
non-negative least squares on relative errors. Writes asapc/planning/costs.json, which the package carries, and
benchmarks/results/costs.json.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.fidelity.latency import measure
from asapc.ops.features import pairs_of
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.planning.bases import COORDINATES
from asapc.planning.costs import MODEL, Shape, work
from asapc.types.choices import Side, SlicedDualParams
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "costs.json"
# (batch, heads, queries, keys, head size)
SHAPES = (
    (1, 4, 64, 64, 16),
    (32, 4, 64, 64, 16),
    (8, 4, 128, 128, 16),
    (8, 2, 128, 128, 64),
    (1, 8, 196, 196, 64),
    (8, 8, 196, 196, 64),
    (8, 4, 64, 256, 16),
    (4, 8, 256, 256, 64),
    (1, 8, 512, 512, 64),
    (1, 8, 1024, 1024, 64),
    (1, 8, 2048, 2048, 64),
)
SECONDS = 2.0


class Attention(nn.Module):
    """An operator with the product that makes its scores."""

    def __init__(self, operator: Sinkhorn | SlicedDual, scale: float) -> None:
        super().__init__()
        self.operator, self.scale = operator, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries (B, H, N, D), keys and values (B, H, M, D) to outputs (B, H, N, D)."""
        scaled = q * self.scale
        if self.operator.lowering == "fused":
            fused: Tensor = self.operator.from_points(scaled, q, k, v)
            return fused
        scores = k @ scaled.transpose(-1, -2) if self.operator.turned else scaled @ k.transpose(-1, -2)
        # Products alone are in the precision of half-precision inputs.
        out: Tensor = self.operator.oriented(scores.to(torch.promote_types(q.dtype, torch.float32)), q, k, v)
        return out


def onnx_runner(module: nn.Module, samples: Samples, folder: Path) -> OnnxRuntimeRunner:
    """Return a module in ONNX Runtime, by way of a file in a folder, with as many threads as torch has."""
    graph = CapturedGraph(export(module.eval(), samples[:2].inputs), samples[:2])
    return OnnxRuntimeRunner(export_onnx(graph, folder / "model.onnx", {}).path, torch.get_num_threads())


def sliced_dual(
    heads: int,
    size: int,
    slices: int,
    pieces: int,
    steps: int,
    side: Side = "keys",
    wide: bool = False,
    paired: bool = False,
    coordinates: int = COORDINATES,
    one_pass: bool = False,
) -> SlicedDual:
    """Return a sliced dual with small random weights."""
    generator = torch.Generator().manual_seed(0)
    coordinates = min(coordinates, size)
    features = slices + coordinates + 1 + coordinates * max(pieces - 1, 0)
    features += 2 * pairs_of(coordinates).shape[-1] * paired
    knots = torch.linspace(-1.5, 1.5, max(pieces - 1, 0)).expand(heads, coordinates if pieces else 0, -1)
    weights = (torch.randn(heads, features + k, generator=generator) / features for k in range(1 + steps))
    basis = torch.eye(size)[:, :coordinates].expand(heads, -1, -1) / size**0.25
    params = SlicedDualParams(basis, basis, slices, knots.contiguous(), tuple(weights), side, paired, one_pass)
    return SlicedDual(params, wide=wide)


def operators(heads: int, size: int) -> dict[str, Sinkhorn | SlicedDual]:
    """Return what is measured, by name."""
    return {
        "softmax": Sinkhorn(1),
        "exact 3": Sinkhorn(3),
        "exact 10": Sinkhorn(10),
        "exact 40": Sinkhorn(40),
        "exact 10, wide": Sinkhorn(10, wide=True),
        "parabolas, 0 steps": sliced_dual(heads, size, 0, 0, 0),
        "parabolas, 3 steps": sliced_dual(heads, size, 0, 0, 3),
        "parabolas, 0 steps, queries": sliced_dual(heads, size, 0, 0, 0, "queries"),
        "parabolas, 2 steps, queries": sliced_dual(heads, size, 0, 0, 2, "queries"),
        "parabolas, 1 step, wide": sliced_dual(heads, size, 0, 0, 1, wide=True),
        "hinges, 0 steps": sliced_dual(heads, size, 0, 8, 0),
        "hinges, 2 steps": sliced_dual(heads, size, 0, 8, 2),
        "pairs, 0 steps": sliced_dual(heads, size, 0, 0, 0, paired=True),
        "pairs, 3 steps": sliced_dual(heads, size, 0, 0, 3, paired=True),
        "hinges and pairs, 1 step": sliced_dual(heads, size, 0, 8, 1, paired=True),
        "8 slices, 1 step": sliced_dual(heads, size, 8, 0, 1),
        "softmax, fused": fused(Sinkhorn(1)),
        "exact 4, fused": fused(Sinkhorn(4)),
        "parabolas, 0 steps, queries, fused": fused(sliced_dual(heads, size, 0, 0, 0, "queries")),
        "hinges, 1 step, fused": fused(sliced_dual(heads, size, 0, 8, 1)),
    }


def fused(operator: Sinkhorn | SlicedDual) -> Sinkhorn | SlicedDual:
    """Return the operator, to be lowered to fused passes."""
    operator.lowering = "fused"
    return operator


def main() -> None:
    """Measure, fit, print, write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[dict[str, Any]] = []
    for batch, heads, queries, keys, size in SHAPES:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(max(batch, 2), heads, n, size, generator=generator) for n in (queries, keys, keys))
        samples = Samples({"q": q, "k": k, "v": v})
        runners, shape = {}, Shape(batch, heads, queries, keys, size)
        modules = operators(heads, size)
        with tempfile.TemporaryDirectory() as folder:
            for name, module in modules.items():
                runners[name] = onnx_runner(Attention(module, size**-0.5), samples, Path(folder))
        for run in measure(runners, samples, batch, SECONDS):
            units = work(shape, modules[run.name])
            rows.append({"shape": shape._asdict(), "operator": run.name, "p50_ms": run.p50_ms, "work": units})
        print(f"measured {shape}", flush=True)
    kinds = sorted({kind for row in rows for kind in row["work"]})
    measured = np.array([row["p50_ms"] for row in rows])
    units = np.array([[row["work"].get(kind, 0.0) for kind in kinds] for row in rows])
    relative = units / measured[:, None]
    scale = relative.max(axis=0)  # units differ by many orders of magnitude
    rates = nnls(relative / scale, np.ones(len(rows)))[0] / scale
    for row, estimate in zip(rows, units @ rates, strict=True):
        row["estimate_ms"] = estimate
        print(f"{row['shape']!s:<78} {row['operator']:<28} {row['p50_ms']:9.3f} {estimate:9.3f}")
    errors = np.abs(units @ rates / measured - 1)
    print(f"estimates are off by {np.median(errors):.1%} in the median, {errors.max():.1%} at most")
    costs = dict(zip(kinds, rates.tolist(), strict=True))
    for kind, cost in costs.items():
        print(f"{kind:<10} {cost:.3e} ms")
    facts = {"threads": torch.get_num_threads(), "environment": environment(seed=0)}
    write_json(MODEL, {"milliseconds": costs, "median_error": float(np.median(errors)), **facts})
    write_json(RESULTS, {"milliseconds": costs, "rows": rows, **facts})


if __name__ == "__main__":
    main()
