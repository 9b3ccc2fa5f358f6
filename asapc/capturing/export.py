"""Calls torch.export: the only place that does."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_structure

from asapc.capturing.open_sizes import OpenSizes
from asapc.errors import AsapcError, CaptureError
from asapc.loading.inputs import arguments, flattened
from asapc.loading.lines import told
from asapc.loading.pt2.archive import silence
from asapc.types.graph import BATCH_AXIS, Axes

aten = torch.ops.aten
# Where functions that a graph applies to sizes, and to tuples of tensors, come from.
OF_SIZES = ("_operator", "math", "torch")
NORMS = {aten.layer_norm.default, aten.group_norm.default}
# Composite operators that passes handle as they are; casts are not among them, since the probe ignores them.
COMPOSITES = {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.chunk.default, aten.mT.default}


def export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Axes | None = None,
    dims: tuple[dict[int, Any], ...] | None = None,
) -> ExportedProgram:
    """Call torch.export with the first axis of every input dynamic and called "batch", or with other dynamic axes.

    Inputs reach the parameters of their names. The program's graph, and its module, take them by position, in the
    order of `inputs`.

    Args:
        module: the model.
        inputs: example inputs.
        axes: open axes by the input's name and their number; None for the batch alone.
        dims: dynamic shapes as torch.export takes them, instead of `axes`.

    Raises:
        CaptureError: torch.export cannot capture the model.
    """
    open_axes = {name: {0: BATCH_AXIS} for name in inputs} if axes is None else axes
    by_name = {axis.name: axis for of_input in open_axes.values() for axis in of_input.values()}
    symbols = {name: Dim(name, min=axis.low, max=axis.high) for name, axis in by_name.items()}
    own = tuple({number: symbols[axis.name] for number, axis in open_axes[name].items()} for name in inputs)
    module = flattened(module, inputs)
    args, kwargs = arguments(module, inputs)
    try:
        # torch.export puts a min of its own among the builtins, for models. By it torch asks at the reshape of a tensor
        # of N + 3 tokens, as with a class token, whether N + 3 is the least of N + 3 and 7 (N + 3), and refuses all N.
        own_min = patch("torch._prims.min", min, create=True)
        with quiet(), torch.no_grad(), OpenSizes(), own_min:
            program: ExportedProgram = torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=own if dims is None else dims,
                strict=False,
            )
            # Decomposes nothing, but turns writes in place into ordinary operations: a loop that divides its
            # plan in place would otherwise outlive the rewrite, since such nodes never count as dead. And regions with
            # automatic casts (of an archive), without gradients or under vmap into plain nodes. It takes as long as the
            # export itself.
            settle(program)
            # Under automatic casts only the pass writes those that composite operations make within.
            if is_plain(program) and not torch.is_autocast_enabled("cpu"):
                program.graph.eliminate_dead_code()
                program.graph_module.recompile()
            else:
                program = program.run_decompositions({})
            separate_outputs(program)
            widen_norms(program)
            if kwargs:
                by_position(program, inputs)
    except AsapcError:
        raise
    except (Exception, SystemExit) as error:
        raise CaptureError(
            f"torch.export cannot capture the model: {told(error)}",
            "the forward must work for every batch size, and for every length of a dynamic axis, and may branch on "
            "values of tensors to end a loop only",
        ) from error
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed and logged during tracing: by the forward, without values, and by torch as it fails."""
    # Of a question about data torch prints the graph so far, hundreds of lines on standard error.
    printed = patch("torch.export._trace.print", lambda *values, **options: None, create=True)
    with silence(), warnings.catch_warnings(), redirect_stdout(None), printed:
        warnings.simplefilter("ignore")
        yield


def settle(program: ExportedProgram) -> None:
    """Write operators that most models have as what the pass would make of them, in place.

    These are casts, copies into order, dropout in evaluation, and slices by their length.
    """
    for node in list(program.graph.nodes):
        match node.target, node.args:
            case aten.to.dtype | aten.to.device | aten.to.dtype_layout, _:
                settle_cast(program, node)
            case aten.contiguous.default, (source,) if not node.kwargs:
                node.target, node.kwargs = aten.clone.default, {"memory_format": torch.contiguous_format}
            case aten.dropout.default, (source, _, False):
                drop(program, node, source)
            case aten.narrow.default, (source, dim, int(start), int(length)) if start >= 0:
                node.target, node.args = aten.slice.Tensor, (source, dim, start, start + length)


def settle_cast(program: ExportedProgram, node: Node) -> None:
    """Drop a cast to the type that a value has, and write another as the copy that it is."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    source = arguments.pop("self")
    value = source.meta["val"]
    dtype = arguments.pop("dtype", None) or value.dtype
    stays = all(arguments.pop(place, None) in (None, getattr(value, place)) for place in ("device", "layout"))
    if not stays or any(arguments.values()):  # asks for a copy, or for an order in memory
        return
    if value.dtype == dtype:
        drop(program, node, source)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}


def drop(program: ExportedProgram, node: Node, source: Node) -> None:
    """Use what a node reads in its place."""
    node.replace_all_uses_with(source, propagate_meta=False)
    program.graph.erase_node(node)


def is_plain(program: ExportedProgram) -> bool:
    """Return whether another pass would change nothing that counts: writes, regions, or views that it would rename."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return all(
        not target._schema.is_mutable
        and (not _is_cia_op(target) or _is_preservable_cia_op(target) or target in COMPOSITES)
        if isinstance(target, OpOverload)
        else target.__module__ in OF_SIZES
        for target in targets
    )


def separate_outputs(program: ExportedProgram) -> None:
    """Give each output a node of its own, in place: ONNX can neither return an input nor one value twice."""
    graph = program.graph_module.graph
    outputs = list(graph.output_node().args[0])
    earlier: set[Node] = set()
    for i, node in enumerate(outputs):
        if not isinstance(node, Node):
            continue
        if node.op == "placeholder" or node in earlier:
            with graph.inserting_before(graph.output_node()):
                outputs[i] = graph.call_function(aten.clone.default, (node,))
            outputs[i].meta = dict(node.meta)
            program.graph_signature.output_specs[i].arg.name = outputs[i].name
        earlier.add(node)
    if tuple(outputs) != tuple(graph.output_node().args[0]):
        graph.output_node().args = (tuple(outputs),)
        program.graph_module.recompile()


def widen_norms(program: ExportedProgram) -> None:
    """Write the casts, in place, that torch makes where a norm's weights are wider than what it normalises.

    Automatic casts leave it so; ONNX has no such operator.
    """
    graph = program.graph_module.graph
    norms = [node for node in graph.nodes if node.target in NORMS and is_mixed(node)]
    for node in norms:
        source = node.args[0]
        narrow, (dtype,) = source.meta["val"].dtype, weight_types(node)
        with graph.inserting_before(node):
            cast = graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        cast.meta = {**source.meta, "val": source.meta["val"].to(dtype)}
        node.replace_input_with(source, cast)
        with graph.inserting_after(node):
            back = graph.call_function(aten._to_copy.default, (node,), {"dtype": narrow})
        back.meta = dict(node.meta)
        node.meta["val"] = node.meta["val"].to(dtype)
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        program.graph_signature.replace_all_uses(node.name, back.name)
    if norms:
        program.graph_module.recompile()


def is_mixed(norm: Node) -> bool:
    """Return whether the weights of a norm are of one type, and what it normalises of another."""
    source: Any = norm.args[0]
    return len(weight_types(norm) - {source.meta["val"].dtype}) == len(weight_types(norm)) == 1


def weight_types(norm: Node) -> set[torch.dtype]:
    """Return the types of the weights of a norm."""
    return {weight.meta["val"].dtype for weight in norm.args[1:] if isinstance(weight, Node)}


def by_position(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> None:
    """Make a program that was exported with keyword arguments take them by position, as its graph does."""
    signature = program.module_call_graph[0].signature
    assert signature is not None  # the first is that of the whole program
    example: tuple[tuple[Tensor, ...], dict[str, Tensor]] = (tuple(inputs.values()), {})
    signature.in_spec = tree_structure(example)
    program.example_inputs = example
