"""Exports a captured graph to an ONNX file."""

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OperatorBase
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from asapc.backends.base import temporary
from asapc.capturing.export import is_plain
from asapc.errors import BuildError, one_line
from asapc.passes.base import PassManager
from asapc.passes.onnx.cleanup import OnnxCleanup
from asapc.passes.onnx.standard_attention import StandardAttention
from asapc.types.artifacts import OnnxArtifact
from asapc.types.graph import CapturedGraph, with_graph

OPSET = 18  # what current runtimes read, TensorRT 10 and ONNX Runtime 1.14 among them


def export_onnx(graph: CapturedGraph, path: Path, metadata: Mapping[str, str], standard: bool = False) -> OnnxArtifact:
    """Write the graph as ONNX, checked by onnx.checker, its open axes dynamic.

    Args:
        graph: the graph; its inputs keep their names.
        path: file to write; it appears whole or not at all.
        metadata: what the file says about its origin.
        standard: write standard operators alone, also where ONNX Runtime has one of its own.

    Raises:
        BuildError: the exporter has no ONNX form of some operation.
    """
    open_axes = [
        {0: "batch"} if graph.axes is None else {number: axis.name for number, axis in graph.axes[name].items()}
        for name in graph.example.inputs
    ]
    passes = [*([StandardAttention()] if standard else []), OnnxCleanup(metadata)]
    model = PassManager(passes)(to_proto(graph, axes=open_axes)).program
    temporary(path).write_bytes(model.SerializeToString(deterministic=True))
    temporary(path).rename(path)
    return OnnxArtifact(path, next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))


def to_proto(graph: CapturedGraph, opset: int = OPSET, axes: list[dict[int, str]] | None = None) -> Any:
    """Return the graph as a ModelProto, as the exporter writes it.

    Args:
        graph: the graph.
        opset: version of the ONNX standard.
        axes: what to call the dynamic axes of each input; None for names like s77.

    Raises:
        BuildError: the exporter has no ONNX form of some operation.
    """
    # A copy, since the exporter changes what it is given, and so do we.
    module = copy.deepcopy(graph.program.graph_module)
    attention, aten = torch.ops.asapc.attention.default, torch.ops.aten
    decompose(module, {attention: multi_head_attention, aten.mT.default: transposed})
    program = with_graph(graph.program, module, PlainProgram if is_plain(graph.program) else ExportedProgram)
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
    name_outputs(exported.model.graph, graph.output_names)
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
    """A program of plain operations, which the exporter decomposes one by one.

    torch traces a whole graph anew to decompose any of it, which takes half of an export.
    """

    def run_decompositions(self, decomp_table: dict[OperatorBase, Callable[..., Any]] | None = None) -> ExportedProgram:
        """Decompose the operators of a table, in place."""
        decompose(self.graph_module, decomp_table or {})
        return with_graph(self, self.graph_module)


def transposed(tensor: Tensor) -> Tensor:
    """Return `tensor.mT` as a transposition, where the exporter writes an Einsum."""
    return tensor.transpose(-1, -2)


def decompose(module: GraphModule, table: Mapping[Any, Callable[..., Any]]) -> None:
    """Replace each operation that a table has by what its function does, in place."""
    graph = module.graph
    for node in [node for node in graph.nodes if node.target in table]:
        leaves, structure = tree_flatten((node.args, node.kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, Node)]

        def function(*values: Any, node: Node = node, leaves: Any = leaves, structure: Any = structure) -> Any:
            following = iter(values)
            own = [next(following) if isinstance(leaf, Node) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(own, structure)
            results = table[node.target](*args, **kwargs)
            return tuple(results) if isinstance(results, tuple) else results  # some have a tuple type of their own

        examples = [operand.meta["val"] for operand in operands]
        traced = make_fx(function, decomposition_table=table)(*examples).graph
        inputs: dict[Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            outputs: Any = graph.graph_copy(traced, inputs)
        if isinstance(outputs, Node):
            node.replace_all_uses_with(outputs)
        else:
            for user in list(node.users):  # each takes one of several outputs by its number
                user.replace_all_uses_with(outputs[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)
    # Each traced operation asks for sizes anew.
    sizes: dict[Any, Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        first = sizes.setdefault(node.args, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    module.recompile()


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


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes about optional packages and its progress lines off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
