"""Puts operators into a captured graph, and exports the rivals of a compiled model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.errors import CaptureError, InternalError
from asapc.passes.rewrite.activations import LowerActivations
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn, keep_float32, keep_output_types, narrow_products
from asapc.types.graph import CapturedGraph
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from asapc.writing.origins import origin_of


def rewrite(
    graph: CapturedGraph,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    precision: torch.dtype = torch.float32,
    activations: Mapping[str, nn.Module] | None = None,
) -> CapturedGraph:
    """Return a copy of the graph in which operators replace their sites.

    Args:
        graph: the graph.
        sites: its sites.
        modules: operators by the site's name.
        precision: of the graph's layers and products, by torch's rules of automatic casts, and of the products that
            operators make; outputs keep their dtype.
        activations: replacements of smooth activations, by their names in `passes.rewrite.activations`.

    Raises:
        InternalError: the rewritten graph cannot be exported. The user's model could be, so it is not at fault.
    """
    if not modules and not activations and precision == torch.float32:
        return graph
    half = None if precision == torch.float32 else precision
    module = RewriteSinkhorn(sites, modules, half)(graph.program.module()).program
    module = LowerActivations(activations or {})(module).program
    if half is not None:
        keep_float32(module)
        narrow_products(module, half)
        keep_output_types(module)
    try:
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            program = export(module, graph.example.inputs, graph.axes)
            return CapturedGraph(program, graph.example, axes=graph.axes)
    except CaptureError as error:
        raise InternalError(f"the model cannot be exported with its operators: {error}") from error


def export_rivals(
    teacher: Teacher,
    variants: Mapping[str, Mapping[str, nn.Module]],
    threads: int,
    folder: Path,
    advance: Callable[[str], None],
) -> dict[str, OnnxRuntimeRunner]:
    """Export what a compiled model is compared with, and open it in the same runtime.

    Args:
        teacher: the model.
        variants: modules by the site's name, by the name of the rival.
        threads: of each session.
        folder: for their files, which stay for as long as sessions are opened anew.
        advance: called with a line about the progress.
    """
    origin, graph, sites = origin_of(teacher.loaded), teacher.graph, teacher.sites
    runners: dict[str, OnnxRuntimeRunner] = {}
    for name, modules in variants.items():
        advance(f"exporting {name} for comparison")
        artifact = origin.write(graph, rewrite(graph, sites, modules), sites, modules, folder / f"{name}.onnx", {})
        runners[name] = OnnxRuntimeRunner(artifact.path, threads, name)
    return runners
