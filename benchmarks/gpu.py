"""One layer of attention on a GPU in every form: as the loop, exact, approximate, one pass, and its rivals, in torch.

    python -m benchmarks.gpu                          # on the GPU; about half an hour
    python -m benchmarks.gpu --quick                  # a check in a minute, nothing is written
    python -m benchmarks.gpu --quick --device cpu     # the same without a GPU

Needs torch, numpy and triton alone; TensorRT is timed too where it and asapc's other packages are installed. 8 heads of
64, random queries, keys and values. Each form is first held to itself in float64, then timed in rounds in which it and
fused softmax take turns, between events on the GPU: launched, replayed as a CUDA graph, and through torch.compile. What
does not fit into memory, or fails, is skipped with the reason. Writes benchmarks/results/gpu_layers.json.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asapc.models.sinkhorn import sinkhorn
from asapc.models.sliced import SlicedTransport
from asapc.ops.sinkhorn import Sinkhorn
from asapc.planning.trials import Attention, fused, sliced_dual
from asapc.timing.gpu import clocks, settle

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_layers.json"
HEADS, SIZE, ITERATIONS = 8, 64, 20
BATCHES = {64: 8, 128: 8, 256: 8, 512: 8, 1024: 8, 2048: 4, 4096: 2, 8192: 1}  # by the length
# Of outputs, relative to the same form in float64 on the same inputs: a form that is further off is not timed.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
CHECK_LENGTH = 4096  # in float64 longer ones take minutes
FLOOR = "softmax, fused"
COMPILED_LENGTHS, ENGINE_LENGTHS = (1024, 4096), (1024, 4096)
COMPILED = ("exact 40", "truncated 3", "hinges, 1", "hinges, 3", "parabolas, 1, fused")
PACKAGES = ("torch", "numpy", "triton", "tensorrt", "tensorrt-rtx-cu12", "onnxruntime-gpu")
# What must hold, as (title, length, dtype, time of, over time of, at least or at most, how much).
GOALS = (
    ("one layer against its loop", 1024, "float16", "teacher", ("hinges, 1", "parabolas, 1, fused"), "at least", 20.0),
    ("one layer against softmax", 4096, "float16", FLOOR, ("hinges, 1", "parabolas, 1, fused"), "at most", 1.8),
)
Row = dict[str, Any]
Clock = Callable[[], float]


class Form(NamedTuple):
    """One way to compute attention: how to make it, and how many matrices of scores it holds at once."""

    make: Callable[[], nn.Module]
    matrices: int


class AsWritten(nn.Module):
    """Attention by the log-domain loop."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries, keys and values (B, H, N, D) to outputs (B, H, N, D)."""
        return sinkhorn(q @ k.transpose(-1, -2) / SIZE**0.5, ITERATIONS) @ v


class FlashSinkhorn(nn.Module):
    """Exact Sinkhorn attention in Triton; in float64 as the loop, which is the same function."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries, keys and values (B, H, N, D) to outputs (B, H, N, D)."""
        if q.dtype == torch.float64:
            return AsWritten()(q, k, v)
        from benchmarks.flash_sinkhorn import sinkhorn_attention

        return sinkhorn_attention(q, k, v, 2 * ITERATIONS, SIZE**-0.5)


def attention(operator: Any) -> nn.Module:
    """Return an operator of asapc as attention."""
    return Attention(operator, SIZE**-0.5)


def forms(device: str) -> dict[str, Form]:
    """Return what is compared, by name; numbers are half-steps."""
    of_triton = {"exact 40, Triton": Form(FlashSinkhorn, 0)} if device == "cuda" else {}
    return {
        FLOOR: Form(lambda: attention(fused(Sinkhorn(1))), 0),
        "teacher": Form(AsWritten, 4),
        "softmax": Form(lambda: attention(Sinkhorn(1)), 3),
        "exact 40": Form(lambda: attention(Sinkhorn(2 * ITERATIONS)), 3),
        **of_triton,
        "exact 40, fused": Form(lambda: attention(fused(Sinkhorn(2 * ITERATIONS))), 0),
        "truncated 3": Form(lambda: attention(Sinkhorn(3)), 3),
        "hinges, 1": Form(lambda: attention(sliced_dual(HEADS, SIZE, 0, 8, 0, one_pass=True)), 3),
        "hinges, 1, fused": Form(lambda: attention(fused(sliced_dual(HEADS, SIZE, 0, 8, 0, one_pass=True))), 0),
        "parabolas, 1, fused": Form(lambda: attention(fused(sliced_dual(HEADS, SIZE, 0, 0, 0, one_pass=True))), 0),
        "parabolas, 2, fused": Form(lambda: attention(fused(sliced_dual(HEADS, SIZE, 0, 0, 0, "queries"))), 0),
        "hinges, 3": Form(lambda: attention(sliced_dual(HEADS, SIZE, 0, 8, 0)), 3),
        "8 slices, 3": Form(lambda: attention(sliced_dual(HEADS, SIZE, 8, 0, 0)), 3),
        "soft-sort transport": Form(lambda: SlicedTransport(temperature=0.1), 5),
    }


def main() -> None:
    """Measure every form at every length and in every precision, and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two short lengths and few rounds; writes only with --out")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument("--only", nargs="+", help="these forms alone")
    parser.add_argument("--out", type=Path, help=f"JSON to write; without --quick {RESULTS.name} by default")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU: give --device cpu for a check, or run this where there is one")
    torch.backends.cuda.matmul.allow_tf32 = False
    out = options.out or (None if options.quick else RESULTS)
    lengths = (64, 100) if options.quick else options.lengths
    bench = Bench(options.device, 0.0 if options.quick else 1.0, options.quick)
    unknown = sorted({*(options.only or ())} - bench.forms.keys())
    if unknown:
        sys.exit(f"no such form: {', '.join(unknown)}; there are {'; '.join(bench.forms)}")
    data: Row = {"environment": environment(options.device), "layers": []}
    for length in lengths:
        for dtype in options.dtypes:
            for row in bench.layer(length, dtype, options.only):
                data["layers"].append(row)
                print(line(row), flush=True)
            data["clocks"] = [vars(reading) for reading in clocks()]
            if out is not None:
                out.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
    print("\n".join(verdicts(data["layers"])))


def environment(device: str) -> Row:
    """Return what a result depends on."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "packages": packages,
    }


class Bench:
    """Checks and times forms on one device.

    Args:
        device: "cuda" or "cpu".
        seconds: to spend on each form, at each length and precision.
        quick: as few rounds as show that all of it runs.
    """

    def __init__(self, device: str, seconds: float, quick: bool) -> None:
        self.device, self.seconds, self.quick, self.forms = device, seconds, quick, forms(device)
        self.rounds = 2 if quick else 20

    def layer(self, length: int, dtype: str, only: list[str] | None) -> Iterator[Row]:
        """Yield every form at one length and precision."""
        batch = 1 if self.quick else BATCHES.get(length, 1)
        inputs = self.inputs(batch, length, getattr(torch, dtype))
        for name, form in self.forms.items():
            if only and name not in only:
                continue
            row: Row = {"form": name, "length": length, "batch": batch, "dtype": dtype}
            try:
                self.guard(form.matrices * batch * HEADS * length**2 * 4)
                module = form.make().eval().to(self.device)
                row |= self.check(module, form, length, dtype)
                if row["error"] <= TOLERANCES[dtype]:
                    row |= self.times(name, module, inputs, length)
                else:
                    row["skipped"] = f"wrong: {row['error']:.1e} from float64"
            # Memory, or a kernel that this GPU does not take: the other forms go on.
            except Exception as error:
                row["skipped"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            yield row
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def inputs(self, batch: int, length: int, dtype: torch.dtype) -> list[Tensor]:
        """Return random queries, keys and values."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, HEADS, length, SIZE)
        return [torch.randn(shape, generator=generator).to(self.device, dtype) for _ in range(3)]

    def guard(self, size: int) -> None:
        """Raise MemoryError where so many bytes are not free."""
        if self.device == "cuda":
            free = torch.cuda.mem_get_info()[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > 0.9 * free:
            raise MemoryError(f"does not fit: {size / 2**30:.1f} GB of scores, {free / 2**30:.1f} GB free")

    def check(self, module: nn.Module, form: Form, length: int, dtype: str) -> Row:
        """Return how far one sample is from the same form in float64, whatever the form holds at once."""
        length = min(length, CHECK_LENGTH)
        self.guard(max(form.matrices, 4) * HEADS * length**2 * 8)
        inputs = self.inputs(1, length, getattr(torch, dtype))
        with torch.no_grad():
            output = module(*inputs).double()
            expected = copy.deepcopy(module).double()(*(tensor.double() for tensor in inputs))
        error = ((output - expected).norm() / expected.norm()).item()
        return {"error": error if math.isfinite(error) else sys.float_info.max, "checked_at": length}

    def times(self, name: str, module: nn.Module, inputs: list[Tensor], length: int) -> Row:
        """Return the medians of a form in each way to run it, with intervals, and of fused softmax beside them."""
        floor = self.forms[FLOOR].make().eval().to(self.device)
        ways: dict[str, Clock] = {
            "floor": self.timed(lambda: floor(*inputs)),
            "launched": self.timed(lambda: module(*inputs)),
        }
        notes: dict[str, str] = {}
        for way, make in self.other_ways(name, module, floor, inputs, length).items():
            try:
                ways[way] = make()
            # Graphs that cannot be captured, compilers that fail, packages that are missing: the others go on.
            except Exception as error:
                notes[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rests = [] if self.quick else [settle(clock) for clock in ways.values()]
        raw = interleaved(ways, self.seconds, self.rounds)
        return {
            "ms": {way: median(times) for way, times in raw.items()},
            "interval": {way: interval(times) for way, times in raw.items()},
            "times_softmax": {
                way: median(a / b for a, b in zip(times, raw[floor_of(way, raw)], strict=True))
                for way, times in raw.items()
                if not way.startswith("floor")
            },
            "rounds": len(raw["floor"]),
            "settled": all(rests),
            "notes": notes,
        }

    def other_ways(
        self, name: str, module: nn.Module, floor: nn.Module, inputs: list[Tensor], length: int
    ) -> dict[str, Callable[[], Clock]]:
        """Return how else to run a form than launched, each made when it is asked for."""
        ways: dict[str, Callable[[], Clock]] = {}
        if self.device == "cuda":
            ways["replayed"] = lambda: self.timed(replayed(lambda: module(*inputs)))
            ways["floor, replayed"] = lambda: self.timed(replayed(lambda: floor(*inputs)))
        if name in COMPILED and (length in COMPILED_LENGTHS and not self.quick):
            ways["compiled"] = lambda: self.timed(compiled(module, inputs))
        if name in (FLOOR, *COMPILED) and length in ENGINE_LENGTHS and self.device == "cuda":
            ways["TensorRT"] = lambda: engine_clock(module, inputs)
        return ways

    def timed(self, call: Callable[[], object]) -> Clock:
        """Return a function that makes a call and returns the milliseconds that it takes on the device."""

        def on_gpu() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.no_grad():
                start.record()
                call()
                end.record()
            end.synchronize()
            return start.elapsed_time(end)

        def on_cpu() -> float:
            start = time.perf_counter()
            with torch.no_grad():
                call()
            return 1e3 * (time.perf_counter() - start)

        clock = on_gpu if self.device == "cuda" else on_cpu
        for _ in range(1 if self.quick else 3):
            clock()
        return clock


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """Return what replays a call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():  # kernels are chosen before anything is captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = call()  # its memory is the graph's

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def compiled(module: nn.Module, inputs: list[Tensor]) -> Callable[[], object]:
    """Return a call of a module through torch.compile."""
    torch._dynamo.reset()
    function = torch.compile(module, dynamic=False)
    return lambda: function(*inputs)


def engine_clock(module: nn.Module, inputs: list[Tensor]) -> Clock:
    """Return what times a module as a TensorRT engine, which needs more packages than the rest."""
    from benchmarks.gpu_runtimes import engine_runner

    runner, samples = engine_runner(module, inputs)
    return lambda: runner.time(samples)


def interleaved(ways: Mapping[str, Clock], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Time each way once in every round, in a new order each round, for some seconds and at least some rounds."""
    raw: dict[str, list[float]] = {way: [] for way in ways}
    order, end, shuffle = list(ways), time.perf_counter() + seconds, random.Random(0).shuffle
    while len(raw[order[0]]) < rounds or time.perf_counter() < end:
        shuffle(order)
        for way in order:
            raw[way].append(ways[way]())
    return raw


def floor_of(way: str, ways: Container[str]) -> str:
    """Return what a way to run a form is compared with: replays with a replay."""
    return f"floor, {way}" if f"floor, {way}" in ways else "floor"


def interval(times: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, from order statistics: whatever the distribution."""
    ordered, count = sorted(times), len(times)
    reach = 0.98 * math.sqrt(count)
    low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
    return ordered[max(low, 0)], ordered[min(high, count - 1)]


def line(row: Row) -> str:
    """Return a row as it is printed."""
    head = f"{row['length']:>5} x {row['batch']} {row['dtype']:<8} {row['form']:<20}"
    if "skipped" in row:
        return f"{head} skipped, {row['skipped']}"
    parts = [f"{way} {ms:.3f}" for way, ms in row["ms"].items()]
    notes = "".join(f"; no {way}: {note}" for way, note in row["notes"].items())
    return f"{head} {', '.join(parts)} ms, error {row['error']:.1e}{notes}"


def verdicts(rows: list[Row]) -> Iterator[str]:
    """Yield what is asked of a GPU, and what came of it."""
    for title, length, dtype, other, names, sense, goal in GOALS:
        here = {
            row["form"]: min(ms for way, ms in row["ms"].items() if not way.startswith("floor"))
            for row in rows
            if row["length"] == length and row["dtype"] == dtype and "ms" in row
        }
        fastest = min((here[name] for name in names if name in here), default=None)
        if fastest is None or other not in here:
            continue
        ratio = here[other] / fastest if sense == "at least" else fastest / here[other]
        met = ratio >= goal if sense == "at least" else ratio <= goal
        yield f"{title}, N = {length}, {dtype}: {ratio:.2f}, {sense} {goal:g}: {'met' if met else 'NOT MET'}"


if __name__ == "__main__":
    main()
