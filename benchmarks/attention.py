"""What attention takes in every form, in ONNX Runtime and in torch: one layer by its length, whole models, and memory.

    python -m benchmarks.attention                  # all of it, about 45 minutes
    python -m benchmarks.attention --only layers    # or torch, models, accelerated, memory

One layer: B in (1, 8), 8 heads of 64, float32, random queries, keys and values; the teacher is the log-domain loop of
20 iterations as it is written. Ratios are of medians of interleaved runs in one process. Models have random weights,
which place attention's share and say nothing about fidelity. models/digits.pt, compiled and accelerated as users do it,
is timed in both runtimes. Writes benchmarks/results/attention.json and what stands in docs/lowerings.md between the two
markers.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asapc.backends.base import Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.commands.accelerate import accelerate
from asapc.commands.compile import compile_model
from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.loading.model import load_model
from asapc.models.blocks import Block
from asapc.models.sinkhorn import sinkhorn
from asapc.models.vit import VisionTransformer
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.planning.costs import shipped
from asapc.planning.operators import lower
from asapc.planning.trials import Attention, fused, sliced_dual
from asapc.timing.rounds import measure
from asapc.types.graph import CapturedGraph, DynamicAxis
from asapc.types.options import Level
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.rewrite import rewrite
from benchmarks.generated import replace_generated
from benchmarks.memory import held

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "attention.json", ROOT / "docs" / "lowerings.md"
ITERATIONS, HEADS, SIZE = 20, 8, 64
BATCHES, LENGTHS = (1, 8), (64, 196, 256, 512, 1024, 2048, 4096)
# The loop as written holds several matrices of scores; beyond this many entries it does not fit, or takes minutes.
TEACHER_ENTRIES = 8 * 4096 * 4096
# Beyond this many, two sessions with a matrix of scores do not fit into memory: each goes alone with the floor.
TOGETHER_ENTRIES = 8 * 8 * 1024 * 1024
FLOOR = "softmax, fused"
TORCH_LENGTHS, TORCH_FORMS = (256, 1024), ("teacher", "softmax, fused", "exact 40", "parabolas, 3")
SECONDS, MIN_ROUNDS, MEMORY_LENGTH = 8.0, 4, 4096
Row = dict[str, Any]


class AsWritten(nn.Module):
    """Attention by the log-domain loop."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries (B, H, N, D), keys and values (B, H, M, D) to outputs (B, H, N, D)."""
        return sinkhorn(q @ k.transpose(-1, -2) / SIZE**0.5, ITERATIONS) @ v


def operators() -> dict[str, Sinkhorn | SlicedDual]:
    """Return what is compared with the teacher, by name; numbers are half-steps."""
    return {
        "softmax, fused": fused(Sinkhorn(1)),
        "softmax": Sinkhorn(1),
        "exact 40": Sinkhorn(2 * ITERATIONS),
        "truncated 3": Sinkhorn(3),
        "8 slices, 3": sliced_dual(HEADS, SIZE, 8, 0, 0),
        "8 slices, 5": sliced_dual(HEADS, SIZE, 8, 0, 1),
        "8 slices, 2, fused": fused(sliced_dual(HEADS, SIZE, 8, 0, 0, "queries")),
        "parabolas, 3": sliced_dual(HEADS, SIZE, 0, 0, 0),
        "parabolas, 5": sliced_dual(HEADS, SIZE, 0, 0, 1),
        "hinges, 3": sliced_dual(HEADS, SIZE, 0, 8, 0),
        "hinges, 1": sliced_dual(HEADS, SIZE, 0, 8, 0, one_pass=True),
        "parabolas, 1, fused": fused(sliced_dual(HEADS, SIZE, 0, 0, 0, one_pass=True)),
        "hinges, 1, fused": fused(sliced_dual(HEADS, SIZE, 0, 8, 0, one_pass=True)),
        "parabolas, 2, fused": fused(sliced_dual(HEADS, SIZE, 0, 0, 0, "queries")),
        "parabolas, 4, fused": fused(sliced_dual(HEADS, SIZE, 0, 0, 1, "queries")),
    }


def modules() -> dict[str, nn.Module]:
    """Return the same as attention, and the teacher."""
    return {"teacher": AsWritten()} | {name: Attention(operator, SIZE**-0.5) for name, operator in operators().items()}


def main() -> None:
    """Measure what is asked for, keep the rest of the JSON, render the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*PARTS, "render"))
    parser.add_argument("--length", type=int, choices=LENGTHS, help="one layer at this length alone, the rest is kept")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak))
        return
    data: Row = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.length:
        again = list(layers((options.length,)))
        rest = [row for row in data["layers"] if row["length"] != options.length]
        data["layers"] = sorted(rest + again, key=lambda row: (row["length"], row["batch"]))
        write_json(RESULTS, data)
    for part, study in PARTS.items():
        if options.only in (None, part) and not options.length:
            data[part] = list(study())
            data["threads"], data["environment"] = torch.get_num_threads(), environment(seed=0)
            write_json(RESULTS, data)
    replace_generated(DOCUMENT, document(data))


def onnx_runner(module: nn.Module, samples: Samples, folder: Path) -> OnnxRuntimeRunner:
    """Return a module in ONNX Runtime, by way of a file in a folder, with as many threads as torch has."""
    graph = CapturedGraph(export(module.eval(), samples[:2].inputs), samples[:2])
    return OnnxRuntimeRunner(export_onnx(graph, folder / "model.onnx", {}).path, torch.get_num_threads())


def inputs(batch: int, length: int) -> Samples:
    """Return random queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    return Samples({name: torch.randn(max(batch, 2), HEADS, length, SIZE, generator=generator) for name in "qkv"})


def medians(
    runners: Mapping[str, Runner], samples: Samples, batch: int, seconds: float = SECONDS, rounds: int = MIN_ROUNDS
) -> dict[str, float]:
    """Return the milliseconds a call, by name."""
    runs = measure(runners, samples, batch, seconds, rounds=rounds)
    return {run.name: run.p50_ms for run in runs}


def layers(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Row]:
    """Yield one layer in ONNX Runtime, at every length and batch."""
    for length in lengths:
        samples = inputs(max(BATCHES), length)
        for batch in BATCHES:
            entries = batch * HEADS * length**2
            names = [name for name in modules() if name != "teacher" or entries <= TEACHER_ENTRIES]
            groups = [names] if entries <= TOGETHER_ENTRIES else [[FLOOR, name] for name in names if name != FLOOR]
            row: Row = {"batch": batch, "length": length, "ms": {}, "floors": {}}
            for group in groups:
                with tempfile.TemporaryDirectory() as folder:
                    runners = {name: onnx_runner(modules()[name], inputs(2, length), Path(folder)) for name in group}
                times = medians(runners, samples, batch)
                row["ms"] |= times
                row["floors"] |= dict.fromkeys(times, times[FLOOR])
            print(batch, length, {name: round(ms, 2) for name, ms in row["ms"].items()}, flush=True)
            yield row


def in_torch() -> Iterator[Row]:
    """Yield one layer in torch, eager and compiled."""
    for length in TORCH_LENGTHS:
        samples = inputs(2, length)
        runners: dict[str, Runner] = {}
        by_name = modules()
        for name, module in ((name, by_name[name]) for name in TORCH_FORMS):
            runners[f"{name}, eager"] = EagerRunner(module)
            torch._dynamo.reset()
            runners[f"{name}, compiled"] = CompiledRunner(module)
        row = {"batch": 1, "length": length, "ms": medians(runners, samples, 1)}
        print(length, {name: round(ms, 2) for name, ms in row["ms"].items()}, flush=True)
        yield row


class CompiledRunner(EagerRunner):
    """A module through torch.compile; the inputs keep their names."""

    runtime = "torch.compile"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.compiled = torch.compile(module, dynamic=False)

    def __call__(self, samples: Samples) -> list[Tensor]:
        """Return the output of one batch."""
        with torch.no_grad():
            return [self.compiled(*samples.inputs.values())]


def memory() -> Iterator[Row]:
    """Yield the largest memory of a process that runs one form of one layer once, and before it does."""
    for name in modules():
        if name == "teacher" or name.startswith("truncated"):
            continue
        command = [sys.executable, "-m", "benchmarks.attention", "--peak", name]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        before, after = map(float, ran.stdout.split()[-2:])
        row = {"name": name, "length": MEMORY_LENGTH, "before_gigabytes": before, "peak_gigabytes": after}
        print(row, flush=True)
        yield row


def peak(name: str) -> str:
    """Return the largest memory before and after one call, in GB."""
    samples = inputs(2, MEMORY_LENGTH)
    # Captured at a length of its own: the example's tensors would count.
    small = inputs(2, 64)
    axes = {of: {0: DynamicAxis("batch", 1, None), 2: DynamicAxis("n", 2, MEMORY_LENGTH)} for of in "qkv"}
    module = modules()[name].eval()
    dynamic = "slices" not in name
    example = small if dynamic else samples
    graph = CapturedGraph(export(module, example.inputs, axes if dynamic else None), example, axes=axes)
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(
            graph if dynamic else CapturedGraph(graph.program, example), Path(folder) / "a.onnx", {}
        ).path
        runner = OnnxRuntimeRunner(path, torch.get_num_threads())
    one = samples[:1]
    before = held("VmHWM")
    runner(one)
    return f"{before / 2**30} {held('VmHWM') / 2**30}"


def models() -> Iterator[Row]:
    """Time whole models: their loops as written, and in every other form."""
    torch.manual_seed(0)
    sizes = {
        "digits ViT": (VisionTransformer(), {"images": torch.rand(8, 8, 8)}, 8),
        "ViT-S/16's size": (encoder(384, 6), {"input": torch.randn(2, 197, 384)}, 1),
        "BERT-base's size": (encoder(768, 12), {"input": torch.randn(2, 512, 768)}, 1),
    }
    for name, (module, feeds, batch) in sizes.items():
        samples = Samples(feeds)
        teacher = study_module(module, samples[:2])
        graph, sites = teacher.graph, teacher.sites
        forms = {
            "exact 40": lambda s: Sinkhorn(s.loop.half_steps),
            "truncated 5": lambda s: Sinkhorn(5),
            "softmax": lambda s: Sinkhorn(1),
            "parabolas, 5": lambda s: sliced_dual(s.loop.heads, s.head_dim, 0, 0, 1),
            "8 slices, 5": lambda s: sliced_dual(s.loop.heads, s.head_dim, 8, 0, 1),
        }
        runners: dict[str, Runner] = {}
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model.onnx"
            runners["teacher"] = OnnxRuntimeRunner(export_onnx(graph, target, {}).path, torch.get_num_threads())
            for form, make in forms.items():
                compiled = rewrite(graph, sites, {s.name: lower(s, make(s), batch, shipped()) for s in sites})
                runners[form] = OnnxRuntimeRunner(export_onnx(compiled, target, {}).path, torch.get_num_threads())
        row = {"model": name, "sites": len(sites), "batch": batch, "ms": medians(runners, samples, batch)}
        print(name, {form: round(ms, 2) for form, ms in row["ms"].items()}, flush=True)
        yield row


def accelerated() -> Iterator[Row]:
    """Yield a shipped model accelerated in torch beside what it is compiled to, and its classes in both."""
    loaded = load_model(ROOT / "models" / "digits.pt")
    held_out = loaded.held_out
    levels: dict[str, Level] = {"as written": 0, "exact": 1, "compiled": 2}
    runners: dict[str, Runner] = {"as written, torch": EagerRunner(loaded.module)}
    for name, level in levels.items():
        if level:
            fast = accelerate(loaded.module, loaded.calibration.inputs, level=level)
            runners[f"{name}, torch"] = EagerRunner(fast)
        with tempfile.TemporaryDirectory() as scratch:
            config = CompileConfig(out=Path(scratch) / "digits.asap", level=level, target="onnx", seconds=1.0)
            compile_model(loaded.path, config)
            runners[f"{name}, ONNX Runtime"] = OnnxRuntimeRunner(config.out / "model.onnx", torch.get_num_threads())
    ours, theirs = (runners[f"compiled, {runtime}"](held_out)[0].argmax(-1) for runtime in ("torch", "ONNX Runtime"))
    same = int((ours == theirs).sum())
    for batch in BATCHES:
        ms = medians(runners, held_out, batch)
        print(batch, {name: round(value, 2) for name, value in ms.items()}, flush=True)
        yield {"batch": batch, "ms": ms, "same": same, "samples": len(held_out)}


PARTS = {"layers": layers, "torch": in_torch, "models": models, "accelerated": accelerated, "memory": memory}


def encoder(width: int, heads: int, depth: int = 12) -> nn.Module:
    """Return transformer blocks with perceptrons of four times the width, as ViT and BERT have them."""
    blocks = [Block(width, heads, 0.25, ITERATIONS) for _ in range(depth)]
    for block in blocks:
        block.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return nn.Sequential(*blocks)


def exponent(rows: list[Row], name: str) -> float:
    """Return how time grows with the length, from 512 tokens on, at batch 1; NaN of a form with one length alone."""
    rows = [row for row in rows if row["batch"] == 1 and row["length"] >= 512 and name in row["ms"]]
    points = [(row["length"], row["ms"][name]) for row in rows]
    if len(points) < 2:
        return math.nan
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0])


def document(data: Row) -> Iterator[str]:
    """Yield the tables."""
    rows = data.get("layers", [])
    names = [name for name in operators() if name != FLOOR]
    for batch in BATCHES:
        yield f"One layer, batch {batch}: times over fused softmax attention's, which is in ms"
        yield ""
        yield "| N | softmax, fused (ms) | teacher | " + " | ".join(names) + " |"
        yield "|" + "---|" * (len(names) + 3)
        for row in rows:
            if row["batch"] == batch:
                ms, floors = row["ms"], row["floors"]
                cells = [f"{ms[name] / floors[name]:.2f}" if name in ms else "" for name in ("teacher", *names)]
                yield f"| {row['length']} | {ms[FLOOR]:.2f} | " + " | ".join(cells) + " |"
        yield ""
    if rows:
        grown = ", ".join(f"{name} {exponent(rows, name):.2f}" for name in (FLOOR, *names))
        yield f"Time grows with the length, from 512 tokens on, with the power: {grown}."
        yield ""
    for row in data.get("torch", []):
        yield f"In torch, N = {row['length']}, ms: " + ", ".join(f"{n} {ms:.1f}" for n, ms in row["ms"].items()) + "."
        yield ""
    for row in data.get("accelerated", []):
        ms = row["ms"]
        gains = "; ".join(
            f"in {runtime} {ms[f'as written, {runtime}']:.1f} as written, {ms[f'exact, {runtime}']:.1f} exact, "
            f"{ms[f'compiled, {runtime}']:.1f} {verb}, {ms[f'as written, {runtime}'] / ms[f'compiled, {runtime}']:.1f} "
            "times as fast"
            for runtime, verb in (("torch", "accelerated"), ("ONNX Runtime", "compiled"))
        )
        yield (
            f"models/digits.pt, batch {row['batch']}, ms: {gains}. Accelerated and compiled agree on the class of "
            f"{row['same']} of {row['samples']} held-out samples."
        )
        yield ""
    if "memory" in data:
        yield f"| N = {MEMORY_LENGTH}, batch 1 | peak of the process, GB | beyond what it held before, GB |"
        yield "|---|---|---|"
        for row in data["memory"]:
            more = row["peak_gigabytes"] - row["before_gigabytes"]
            yield f"| {row['name']} | {row['peak_gigabytes']:.2f} | {more:.2f} |"
        yield ""
    if "models" in data:
        forms = list(data["models"][0]["ms"])
        yield "| model, ms a batch | batch | " + " | ".join(forms) + " |"
        yield "|" + "---|" * (len(forms) + 2)
        for row in data["models"]:
            yield f"| {row['model']} | {row['batch']} | " + " | ".join(f"{row['ms'][f]:.1f}" for f in forms) + " |"
        yield ""


if __name__ == "__main__":
    main()
