"""Writes what stands in an output folder for those who use the model: its interface, samples with outputs, a README."""

from importlib import resources
from pathlib import Path

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.runtime.files import write_arrays
from asapc.types.artifacts import EngineResult
from asapc.types.graph import CapturedGraph
from asapc.types.interface import AxisRange, Interface, TensorInfo
from asapc.types.samples import Samples

SAMPLES, EXPECTED, README = "samples.npz", "expected.npz", "README.md"


def interface_of(runner: OnnxRuntimeRunner, graph: CapturedGraph) -> Interface:
    """Return what a compiled model takes and returns: as its file says it, with the ranges it was compiled for."""
    inputs, outputs = (
        tuple(TensorInfo(value.name, runner.dtype(value), tuple(value.shape)) for value in values)
        for values in (runner.session.get_inputs(), runner.session.get_outputs())
    )
    sizes = {size for info in (*inputs, *outputs) for size in info.shape if isinstance(size, str)}
    of_graph = {axis.name: axis for axes in (graph.axes or {}).values() for axis in axes.values()}
    ranges = {name: AxisRange(axis.low, axis.high) for name, axis in of_graph.items()}
    return Interface(inputs, outputs, {name: ranges.get(name, AxisRange(1, None)) for name in sorted(sizes)})


def write_samples(folder: Path, samples: Samples, runner: OnnxRuntimeRunner) -> None:
    """Write samples, and what the compiled model returns for them as one batch; nothing where there are none."""
    if len(samples):
        write_arrays(folder / SAMPLES, {name: samples.inputs[name] for name in runner.inputs})
        write_arrays(folder / EXPECTED, dict(zip(runner.outputs, runner(samples), strict=True)))


def write_readme(folder: Path, name: str, interface: Interface, engine: EngineResult, samples: int) -> None:
    """Write README.md: what the model takes, and lines to copy that run it.

    Args:
        folder: the output folder.
        name: what to call the model.
        interface: what it takes and returns.
        engine: what came of the engine.
        samples: how many stand in the folder.
    """
    import jinja2

    text = resources.files("asapc.writing").joinpath("templates/README.md.j2").read_text()
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(text).render(
        name=name,
        interface=interface,
        engine=engine.artifact,
        module="tensorrt_rtx" if engine.artifact and "rtx" in engine.artifact.builder else "tensorrt",
        samples=samples,
    )
    (folder / README).write_text(page)
