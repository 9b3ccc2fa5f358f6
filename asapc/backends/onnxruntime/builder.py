"""Exports a captured graph to an ONNX file."""

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OperatorBase, OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
from torch.onnx._internal.fx.passes import type_promotion

from asapc.backends.base import temporary
from asapc.backends.onnxruntime.places import places_of
from asapc.capturing.export import is_plain
from asapc.errors import BuildError, one_line
from asapc.ops.fused import ATTENTION
from asapc.passes.base import PassManager
from asapc.passes.onnx.cleanup import OnnxCleanup
from asapc.passes.onnx.nodes import opset_of
from asapc.passes.onnx.standard_attention import StandardAttention
from asapc.types.artifacts import OnnxArtifact
from asapc.types.graph import CapturedGraph, with_graph

MANY_POINTS = 25  # beyond which `torch.cdist` takes products
OPSET = 18  # what current runtimes read, TensorRT 10 and ONNX Runtime 1.14 among them


def export_onnx(
    graph: CapturedGraph,
    path: Path,
    metadata: Mapping[str, str],
    standard: bool = False,
    names: Sequence[str] | None = None,
) -> OnnxArtifact:
    """Write the graph as ONNX, checked by onnx.checker, its open axes dynamic.

    Args:
        graph: the graph; its inputs keep their names.
        path: file to write; it appears whole or not at all.
        metadata: what the file says about its origin.
        standard: write standard operators alone, also where ONNX Runtime has one of its own.
        names: what to call the outputs, in their order; None for the graph's own names.

    Raises:
        BuildError: the exporter has no ONNX form of some operation.
    """
    open_axes = [
        {0: "batch"} if graph.axes is None else {number: axis.name for number, axis in graph.axes[name].items()}
        for name in graph.example.inputs
    ]
    passes = [*([StandardAttention()] if standard else []), OnnxCleanup(metadata)]
    exported = to_proto(graph, axes=open_axes, names=names)
    places = places_of(exported)
    model = PassManager(passes)(exported).program
    temporary(path).write_bytes(model.SerializeToString(deterministic=True))
    temporary(path).rename(path)
    return OnnxArtifact(path, opset_of(model), places)


def to_proto(
    graph: CapturedGraph,
    opset: int = OPSET,
    axes: list[dict[int, str]] | None = None,
    names: Sequence[str] | None = None,
) -> Any:
    """Return the graph as a ModelProto, as the exporter writes it.

    Args:
        graph: the graph.
        opset: version of the ONNX standard.
        axes: what to call the dynamic axes of each input; None for names like s77.
        names: what to call the outputs, in their order; None for the graph's own names.

    Raises:
        BuildError: the exporter has no ONNX form of some operation.
    """
    # A copy, since the exporter changes what it is given.
    module = copy.deepcopy(graph.program.graph_module)
    program = with_graph(graph.program, module, PlainProgram if is_plain(graph.program) else ExportedProgram)
    aten = torch.ops.aten
    table = {ATTENTION: multi_head_attention, aten.mT.default: transposed}
    # Plain programs have the first of these.
    table |= dict.fromkeys((aten.cdist.default, aten._cdist_forward.default), distances)
    if any(node.target in table for node in module.graph.nodes):
        program = program.run_decompositions(table)
    with quiet_exporter():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=list(graph.example.inputs),
                dynamic_shapes=axes,
                custom_translation_table={torch.ops.aten.gelu.default: gelu},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause: BaseException = error  # the innermost names the operation; those around it are boilerplate
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise BuildError(
                f"torch.onnx cannot export the model: {one_line(cause)}",
                "replace the operation that it names in the model",
            ) from error
    assert exported is not None  # with dynamo=True the exporter always returns one
    name_outputs(exported.model.graph, graph.output_names if names is None else names)
    return exported.model_proto


def name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Name the outputs of a graph of onnx-ir, in place, and values within it that bear one of these names anew."""
    outputs = dict(zip(graph.outputs, names, strict=True))
    for node in graph.all_nodes():
        for value in node.outputs:
            if value not in outputs and value.name in names:
                value.name = f"{value.name}.inner"
    for value, name in outputs.items():
        if name not in graph.initializers:
            value.name = name


class PlainProgram(ExportedProgram):
    """A program of plain operations, which the exporter decomposes one by one where it can.

    torch traces a whole graph anew to decompose any of it, which takes half of an export.
    """

    def run_decompositions(self, decomp_table: dict[OperatorBase, Callable[..., Any]] | None = None) -> ExportedProgram:
        """Decompose the operators of a table."""
        table = torch.export.default_decompositions() if decomp_table is None else decomp_table
        graphs: dict[Node, Graph] = {}
        for node in self.graph.nodes:
            if node.target in table:
                graph = trace_alone(node, table)
                if graph is None:
                    decomposed: ExportedProgram = super().run_decompositions(decomp_table)
                    return decomposed
                graphs[node] = graph
        if not graphs:
            return self
        for node, graph in graphs.items():
            put_in_place(node, graph)
        share_sizes(self.graph)
        self.graph_module.recompile()
        return with_graph(self, self.graph_module, PlainProgram)


def trace_alone(node: Node, table: Mapping[Any, Callable[..., Any]]) -> Graph | None:
    """Trace what the function of a table does for a node; None where that needs the graph around it.

    Some functions write in place, or make constants, which tracing takes apart for a whole graph only.
    """
    operands = node.all_input_nodes

    def function(*values: Any) -> Any:
        value_of = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), value_of.__getitem__)
        results = table[node.target](*args, **kwargs)
        return tuple(results) if isinstance(results, tuple) else results  # some have a tuple type of their own

    examples = [operand.meta["val"] for operand in operands]
    mode = detect_fake_mode(examples)
    if mode is None:
        return None
    try:
        with mode:
            graph = make_fx(function, decomposition_table=table)(*examples).graph
    except Exception:  # whatever a function meets that was written for the other way
        return None
    calls = [other for other in graph.nodes if other.op not in ("placeholder", "output")]
    writes = [call for call in calls if isinstance(call.target, OpOverload) and call.target._schema.is_mutable]
    return None if writes or any(call.op != "call_function" for call in calls) else graph


def put_in_place(node: Node, graph: Graph) -> None:
    """Replace a node by a graph of which the inputs are the nodes that it reads, in their order."""
    inputs: dict[Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        outputs: Any = node.graph.graph_copy(graph, inputs)
    if isinstance(outputs, Node):
        node.replace_all_uses_with(outputs)
    else:
        for user in list(node.users):  # each takes one of several outputs by its number
            user.replace_all_uses_with(outputs[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def share_sizes(graph: Graph) -> None:
    """Ask for each size once: each operation that was traced alone asks anew."""
    sizes: dict[Any, Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        first = sizes.setdefault(node.args, node)
        if first is not node:
            node.replace_all_uses_with(first)
            node.graph.erase_node(node)


def transposed(tensor: Tensor) -> Tensor:
    """Return `tensor.mT` as a transposition, where the exporter writes an Einsum."""
    return tensor.transpose(-1, -2)


def distances(left: Tensor, right: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Write `torch.cdist`, which the exporter has no form of, as torch computes it: by products where points are many.

    Args:
        left: (..., N, D).
        right: (..., M, D).
        p: of the norm.
        compute_mode: when Euclidean distances are taken by products: 0 or None, where N or M exceeds 25; 1, always; 2,
            never.

    Returns:
        (..., N, M).
    """
    numbers = [tensor.shape[-2] for tensor in (left, right)]
    many = any(not isinstance(number, int) or number > MANY_POINTS for number in numbers)
    if p == 2 and (compute_mode == 1 or (many and compute_mode != 2)):
        own, other = (tensor.square().sum(dim=-1, keepdim=True) for tensor in (left, right))
        return (own + other.mT - 2 * (left @ right.mT)).clamp_min(0).sqrt()
    apart = (left.unsqueeze(-2) - right.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).to(apart.dtype).sum(dim=-1)
    if p == math.inf:
        return apart.amax(dim=-1)
    return apart.sum(dim=-1) if p == 1 else apart.pow(p).sum(dim=-1).pow(1 / p)


def multi_head_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Write `ops.fused.attention` as ONNX Runtime's own operator, which on the CPU never holds the scores.

    Samples and heads are passed as samples of one head: in that layout nothing has to be transposed.
    """
    inputs = [tensor.flatten(0, 1) for tensor in (queries, keys, values)]
    shape = (*inputs[0].shape[:-1], values.shape[-1])
    attributes: dict[str, Any] = {"num_heads": 1, "scale": 1.0}
    output: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention", inputs, attributes, dtype=queries.dtype, shape=shape, version=1
    )
    return torch.unflatten(output, 0, queries.shape[:2])


def gelu(x: Any, approximate: str = "none") -> Any:
    """Write GELU as (0.5 x) (1 + erf), which ONNX Runtime fuses into one kernel with the bias before it.

    The exporter writes x (0.5 (1 + erf)), which ONNX Runtime runs in five passes. Halving is exact, so both are equal.
    """
    from onnxscript import ir, opset18
    from onnxscript.function_libs.torch_lib.ops.nn import aten_gelu

    if approximate != "none":
        return aten_gelu(x, approximate)
    root, one, half = (ir.tensor(value, dtype=x.dtype) for value in (math.sqrt(2), 1.0, 0.5))
    doubled = opset18.Add(opset18.Erf(opset18.Div(x, root)), one)
    return opset18.Mul(opset18.Mul(x, half), doubled)


@cache
def once(read: Callable[[], Any]) -> Any:
    """Return what a function without arguments returned first."""
    return read()


def quick_matching() -> AbstractContextManager[Any]:
    """Keep the exporter's optimizer from searches that have to fail, if it is a version that is known here.

    For a pattern of several outputs it lists the whole graph at each node, also where the first output is of another
    operator: two thirds of the export of a loop of a hundred half-steps.
    """
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher as Matcher

        whole = Matcher.match
    except (ImportError, AttributeError):
        return contextlib.nullcontext()

    def match(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        first = self.pattern.output_nodes[0].op_identifier()
        if first not in (None, node.op_identifier()):
            return MatchResult().fail("another operator")
        return whole(self, model, graph, node, **options)

    return patch.object(Matcher, "match", match)


def run_promoted(self: Any, node: Node) -> Any:
    """Stand in for `run_node` of the pass that promotes types, which runs every node to learn what it returns.

    The program says that of each node, and the pass itself of those that it changes. Running them takes two fifths of
    an export.
    """
    with self._set_current_node(node):
        rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            self._maybe_promote_node(node, rule)
    value = node.meta.get("val") if node.op == "call_function" else None
    return Interpreter.run_node(self, node) if value is None else value


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes and progress lines off the terminal, and its table of operations in memory."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            # Each call parses the source of all its functions again: a third of the time of a small export.
            patch.object(onnxscript_apis, "get_torchlib_ops", partial(once, onnxscript_apis.get_torchlib_ops)),
            quick_matching(),
            patch.object(type_promotion._TypePromotionInterpreter, "run_node", run_promoted),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
