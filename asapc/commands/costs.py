"""`asapc costs`: what operators take on this machine, for the planner to compare them by."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from asapc.backends.base import Runner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.cuda import CudaRunner
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.commands.study import torch_threads
from asapc.commands.target import products_of, provider_of
from asapc.config import CompileConfig
from asapc.errors import DependencyError, OptionError
from asapc.events import OnEvent, stage
from asapc.planning.costs import Shape, work
from asapc.planning.trials import FEW_OPERATORS, FEW_SHAPES, Attention, operators
from asapc.planning.unit_costs import Binding, Trial, fit_costs, median_error
from asapc.timing.rounds import measure
from asapc.types.costs import SCHEMA, Provider
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.writing.environment import environment

SECONDS = 8.0  # to time all operators at one shape
# Estimates off by more than this in the median were measured on a busy machine: on an idle one they are off by half.
MAX_ERROR = 0.25


def measure_costs(
    config: CompileConfig,
    on_event: OnEvent = lambda event: None,
    shapes: Sequence[Shape] = FEW_SHAPES,
    names: Sequence[str] = FEW_OPERATORS,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Time operators on this machine, and fit what a unit of each kind of work takes.

    Args:
        config: options; the target, the precision and the threads matter here.
        on_event: called with progress.
        shapes: to time the operators at.
        names: of `planning.trials.operators`, those to time.
        seconds: for each shape.

    Returns:
        What the file of costs holds, as docs/costs.schema.json describes it.

    Raises:
        OptionError: there are no costs of this target or precision.
        DependencyError: the target is a GPU, and torch sees none.
        BuildError: ONNX Runtime finds no CUDA.
    """
    provider = measurable_provider(config)
    trials: list[Trial] = []
    with torch_threads(config.threads) as threads, tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            with stage("measure", on_event) as step:
                dtype = getattr(torch, config.precision)
                timed = time_operators(shape, names, provider, dtype, seconds, Path(folder), step.advance)
                trials += timed.values()
                step.summary = f"{len(timed)} operators at {shape}"
        return costs_data(trials, provider, config.precision, threads)


def measurable_provider(config: CompileConfig) -> Provider:
    """Return the provider to measure in; see `measure_costs` for errors."""
    if config.target.startswith("tensorrt"):
        raise OptionError(
            f"costs cannot be measured for --target {config.target}", "give --target cuda, whose costs serve it"
        )
    provider = provider_of(config.target)
    if config.precision != products_of(provider, config.precision):
        fitting = "float16, whose costs bfloat16 reads" if provider == "cuda" else "float32, which a CPU runs"
        raise OptionError(f"costs cannot be measured for --precision {config.precision}", f"give --precision {fitting}")
    if provider == "cuda" and not torch.cuda.is_available():
        raise DependencyError(
            "the costs of a GPU cannot be measured: torch sees none",
            "give --target onnx to measure the CPU, or install torch with CUDA on a machine with an NVIDIA GPU",
        )
    return provider


def time_operators(
    shape: Shape,
    names: Sequence[str],
    provider: Provider,
    dtype: torch.dtype,
    seconds: float,
    folder: Path,
    advance: Callable[[str], None] = lambda detail: None,
) -> dict[str, Trial]:
    """Time operators at one shape, interleaved in one process.

    Args:
        shape: of the scores.
        names: of the operators.
        provider: what runs them.
        dtype: of queries, keys and values.
        seconds: to spend on timing them all.
        folder: keeps their ONNX files, which serve all batch sizes.
        advance: called with a line about the progress.

    Returns:
        The median of each, by its name.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": shape.queries, "k": shape.keys, "v": shape.keys}
    batch = max(shape.batch, 2)  # of one sample torch.export would make a constant
    inputs = {n: torch.randn(batch, shape.heads, m, shape.head_dim, generator=generator) for n, m in sizes.items()}
    samples = Samples({name: value.to(dtype) for name, value in inputs.items()})
    on_device = Samples({name: value.to(provider) for name, value in samples[: shape.batch].inputs.items()})
    modules = {name: module for name, module in operators(shape.heads, shape.head_dim).items() if name in names}
    runners: dict[str, Runner] = {}
    for number, (name, module) in enumerate(modules.items()):
        path = folder / "{}.{}".format(number, "x".join(map(str, shape[1:])))
        if not path.exists():
            advance(f"exporting {name} at {shape}")
            attention = Attention(module, shape.head_dim**-0.5).eval()
            graph = CapturedGraph(export(attention, samples[:2].inputs), samples[:2])
            export_onnx(graph, path, {})
        if provider == "cuda":
            runners[name] = CudaRunner(path, on_device)
        else:
            runners[name] = OnnxRuntimeRunner(path, torch.get_num_threads())
    advance(f"timing {len(runners)} operators at {shape}")
    runs = measure(runners, on_device, shape.batch, seconds)
    return {run.name: Trial(work(shape, modules[run.name]), run.p50_ms) for run in runs}


def costs_data(
    trials: Sequence[Trial],
    provider: Provider,
    precision: str,
    threads: int | None,
    measured_on: Mapping[str, Any] | None = None,
    bindings: Mapping[str, Binding] | None = None,
) -> dict[str, Any]:
    """Fit costs to trials, and return what their file holds.

    Args:
        trials: the operators that were timed.
        provider: what ran them.
        precision: of their products.
        threads: of ONNX Runtime on a CPU.
        measured_on: `environment` of the machine; None for this one.
        bindings: see `fit_costs`.
    """
    facts = dict(measured_on or environment(seed=0))
    costs, estimates = fit_costs(trials, bindings)
    return {
        "schema": SCHEMA,
        "provider": provider,
        "precision": precision,
        "device": facts["cpu"] if provider == "cpu" else facts["gpus"][0],
        **({"threads": threads} if provider == "cpu" else {}),
        "milliseconds": costs,
        "bound": {kind: binding.why for kind, binding in (bindings or {}).items()},
        "median_error": median_error(trials, estimates),
        "environment": facts,
    }
