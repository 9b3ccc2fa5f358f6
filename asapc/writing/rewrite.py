"""Puts operators into a captured graph and writes it as ONNX."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from asapc.backends.base import Runner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.backends.onnxruntime.splicer import splice_onnx
from asapc.capturing.export import export
from asapc.capturing.onnx import OnnxGraph
from asapc.errors import CaptureError, InternalError
from asapc.passes.rewrite.activations import LowerActivations
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn, keep_float32, keep_output_types
from asapc.types.artifacts import OnnxArtifact
from asapc.types.graph import CapturedGraph
from asapc.types.site import Site


def rewrite(
    graph: CapturedGraph,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    precision: torch.dtype = torch.float32,
    activations: Mapping[str, nn.Module] | None = None,
) -> CapturedGraph:
    """A copy of the graph with operators in the place of the sites that have one.

    Args:
        graph: the graph.
        sites: its sites.
        modules: operators by the site's name.
        precision: of the graph's layers and products, by torch's rules of automatic casts, and of the products that
            operators make; outputs keep their dtype.
        activations: what stands in for smooth activations, by their names in `passes.rewrite.activations`.

    Raises:
        InternalError: the rewritten graph cannot be exported. The user's model was, so that it is not at fault.
    """
    if not modules and not activations and precision == torch.float32:
        return graph
    half = None if precision == torch.float32 else precision
    module = RewriteSinkhorn(sites, modules, half)(graph.program.module()).program
    module = LowerActivations(activations or {})(module).program
    if half is not None:
        keep_float32(module)
        keep_output_types(module)
    try:
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            program = export(module, graph.example.inputs, graph.axes)
            return CapturedGraph(program, graph.example, axes=graph.axes)
    except CaptureError as error:
        raise InternalError(f"the model cannot be exported with its operators: {error}") from error


def write_onnx(
    graph: CapturedGraph,
    compiled: CapturedGraph,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    path: Path,
    metadata: Mapping[str, str],
) -> OnnxArtifact:
    """Write a graph that was rewritten, or the file that it was read from with the same operators.

    Raises:
        BuildError: as of `export_onnx` and `splice_onnx`.
    """
    if isinstance(graph, OnnxGraph):
        return splice_onnx(graph, sites, modules, path, metadata)
    return export_onnx(compiled, path, metadata)


def export_rivals(
    graph: CapturedGraph,
    sites: Sequence[Site],
    variants: Mapping[str, Mapping[str, nn.Module]],
    threads: int,
    advance: Callable[[str], None],
) -> dict[str, Runner]:
    """Sessions of what a compiled model is compared with, in the same runtime."""
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, modules in variants.items():
            advance(f"exporting {name} for comparison")
            target = Path(scratch) / f"{name}.onnx"
            artifact = write_onnx(graph, rewrite(graph, sites, modules), sites, modules, target, {})
            runners[name] = OnnxRuntimeRunner(artifact.path, threads, name)
    return runners
