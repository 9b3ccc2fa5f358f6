"""Measures what operators cost in ONNX Runtime, and fits the models by which the planner compares them.

    python -m benchmarks.costs          # on the CPU
    python -m benchmarks.costs --gpu    # anywhere, from what `benchmarks.gpu_runtimes` measured

Each operator runs alone, with the product that makes its scores, on random queries, keys and values; latencies are
medians of interleaved runs in one process. Milliseconds a unit of work (`asapc.planning.costs.work`) follow by
non-negative least squares on relative errors. `asapc costs` does the same with fewer operators and shapes. Writes
asapc/planning/*.costs.json, which the package carries, and benchmarks/results/costs.json or gpu_costs.json.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from asapc.commands.costs import costs_data, time_operators
from asapc.ops.sinkhorn import Sinkhorn
from asapc.planning.costs import Shape, shipped, shipped_file, work
from asapc.planning.trials import FEW_SHAPES, operators
from asapc.planning.unit_costs import Binding, Trial
from asapc.types.costs import Provider
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks import attention

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = (
    *FEW_SHAPES,
    Shape(8, 2, 128, 128, 64),
    Shape(1, 8, 196, 196, 64),
    Shape(8, 8, 196, 196, 64),
    Shape(8, 4, 64, 256, 16),
    Shape(1, 8, 512, 512, 64),
    Shape(1, 8, 2048, 2048, 64),
)
SECONDS = 2.0

# What an H200 can do: products a second by precision, and bytes from and to its memory a second. NVIDIA's figures,
# without sparsity; float32 without TF32.
PEAK_PRODUCTS, BANDWIDTH = {"float32": 67e12 / 2, "float16": 990e12 / 2}, 4.8e12
SCORE_TRAFFIC = 16  # bytes an entry: scores of four bytes are written by the product, read and written by softmax, read
DIGITS = Shape(0, 4, 64, 64, 16)  # of a site of models/digits.pt, which has two of 40 half-steps
Row = dict[str, Any]


def main() -> None:
    """Measure, fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="fit the costs of a GPU to benchmarks/results/gpu.json")
    if parser.parse_args().gpu:
        fit_gpu()
    else:
        measure_cpu()


def measure_cpu() -> None:
    """Measure the CPU, and write its costs."""
    trials: list[Trial] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            timed = time_operators(
                shape, list(operators(shape.heads, shape.head_dim)), "cpu", torch.float32, SECONDS, Path(folder)
            )
            trials += timed.values()
            rows += [{"shape": shape._asdict(), "operator": name} for name in timed]
            print(f"measured {shape}", flush=True)
    facts = environment(seed=0)
    costs = fit("cpu", "float32", trials, rows, facts, {})
    results = {"milliseconds": costs, "rows": rows, "threads": torch.get_num_threads(), "environment": facts}
    write_json(RESULTS / "costs.json", results)


def fit_gpu() -> None:
    """Fit the costs of a GPU in both precisions, and write them."""
    gpu = json.loads((RESULTS / "gpu.json").read_text())
    results: Row = {}
    for precision in PEAK_PRODUCTS:
        trials, rows = [], []
        for layer in gpu["layers"]:
            if layer["dtype"] != precision:
                continue
            shape = Shape(layer["batch"], attention.HEADS, layer["length"], layer["length"], attention.SIZE)
            for name, module in attention.operators().items():
                if name in layer["ms"]:
                    # As it is launched, not as replayed: CUDA graphs need shapes that never change, and code for it.
                    trials.append(Trial(work(shape, module), layer["ms"][name]))
                    rows.append({"shape": shape._asdict(), "operator": name})
        costs = fit("cuda", precision, trials, rows, gpu["environment"], bindings(precision))
        results[precision] = {"milliseconds": costs, "rows": rows, "digits": digits(costs, gpu["models"], precision)}
    write_json(RESULTS / "gpu_costs.json", {**results, "environment": gpu["environment"]})


def bindings(precision: str) -> dict[str, Binding]:
    """Return how kinds of work are bound that one layer with heads of one size does not tell apart, or does not have.

    What the layers do not have keeps its ratio to a like kind on the CPU: as many small operations are launched, or as
    many numbers moved.
    """
    cpu = shipped("cpu").milliseconds
    product = (1 / PEAK_PRODUCTS[precision]) / (SCORE_TRAFFIC / BANDWIDTH)

    def as_on_a_cpu(kind: str, like: str) -> Binding:
        return Binding(like, cpu[kind] / cpu[like], f"to `{like}` as on a CPU: the layers do not tell it")

    return {
        "product": Binding(
            "softmax",
            product,
            f"{product:.2g} x `softmax`: with heads of one size the two are one; shared by what the GPU can do at most",
        ),
        "project": Binding("product", 1, "1 x `product`: both count products of two numbers"),
        "fused_product": Binding("product", 1, "1 x `product`: both count products of two numbers"),
        "pass": Binding("matvec", 2, "2 x `matvec`: reads and writes what that reads"),
        "vector": Binding("matvec", 0, "0: vectors of all matrices are one launch, which `half_step` counts"),
        "hinge": as_on_a_cpu("hinge", "coordinate"),
        "form": as_on_a_cpu("form", "coordinate"),
        "paired": as_on_a_cpu("paired", "estimate"),
    }


def fit(
    provider: Provider,
    precision: str,
    trials: list[Trial],
    rows: list[Row],
    facts: Mapping[str, Any],
    bound: Mapping[str, Binding],
) -> dict[str, float]:
    """Fit costs to trials, write them into the package, and complete the rows of the results."""
    data = costs_data(trials, provider, precision, torch.get_num_threads(), facts, bound)
    costs: dict[str, float] = data["milliseconds"]
    for row, trial in zip(rows, trials, strict=True):
        estimate = sum(count * costs[kind] for kind, count in trial.work.items())
        row |= {"p50_ms": trial.milliseconds, "work": trial.work, "estimate_ms": estimate}
        print(f"{Shape(**row['shape'])!s:<44} {row['operator']:<36} {trial.milliseconds:9.3f} {estimate:9.3f}")
    largest = max(abs(row["estimate_ms"] / row["p50_ms"] - 1) for row in rows)
    print(f"{provider}, {precision}: off by {data['median_error']:.1%} in the median, {largest:.1%} at most")
    for kind, cost in costs.items():
        print(f"{kind:<14} {cost:.3e} ms  {data['bound'].get(kind, '')}")
    write_json(shipped_file(provider, precision), data)
    return costs


def digits(costs: Mapping[str, float], models: list[Row], precision: str) -> list[Row]:
    """Return what loops add to softmax attention in the digits model, which nothing was fitted to, and by estimate."""
    rows = []
    for model in models:
        shape = DIGITS._replace(batch=model["batch"])
        floor = work(shape, Sinkhorn(1))
        for name, half_steps in (("exact", 40), ("truncated", 3)):
            more = {kind: count - floor.get(kind, 0) for kind, count in work(shape, Sinkhorn(half_steps)).items()}
            ms, estimate = (
                model["ms"][f"{name}, {precision}"] - model["ms"][f"softmax, {precision}"],
                2 * sum(count * costs[kind] for kind, count in more.items()),
            )
            rows.append({"batch": model["batch"], "operator": name, "added_ms": ms, "estimate_ms": estimate})
            print(f"digits, batch {model['batch']}, {name}: {ms:.2f} ms more than softmax, by estimate {estimate:.2f}")
    return rows


if __name__ == "__main__":
    main()
