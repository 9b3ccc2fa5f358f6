"""Writes a compiled ONNX file: the file itself, with operators instead of its loops."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, Node

from asapc.backends.base import temporary
from asapc.backends.onnxruntime.builder import OPSET, to_proto
from asapc.capturing.export import export
from asapc.capturing.onnx import region_module
from asapc.errors import BuildError
from asapc.loading.onnx.module import OnnxModule
from asapc.loading.onnx.reader import MAX_FILE, UPGRADE, opset_of
from asapc.passes.onnx.splice import Piece, SpliceOnnx
from asapc.passes.record import record
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.types.artifacts import OnnxArtifact
from asapc.types.engine import Place
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Site

# Attributes that older opsets lack, and without which nodes of the exporter do the same.
DROPPABLE = {"allowzero", "noop_with_empty_axes", "num_outputs"}


def splice_onnx(
    file: OnnxModule,
    graph: CapturedGraph,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    path: Path,
    metadata: Mapping[str, str],
) -> OnnxArtifact:
    """Write an ONNX file whose sites are replaced by their operators; all else of it stays as it is.

    Args:
        file: the file.
        graph: the same, captured.
        sites: of the graph.
        modules: operators by the site's name.
        path: file to write; it appears whole or not at all.
        metadata: what the file says about its origin, besides its own entries.

    Raises:
        BuildError: an operator cannot be written in the file's opset, or the file grows beyond what ONNX can hold.
    """
    opset = opset_of(file.model)
    pieces = Cutter(file, graph, sites, modules).pieces() if modules else []
    # An operator is fitted to a number of tokens: it fixes axes that the file leaves open.
    sizes = {name: dict(enumerate(value.shape[1:], 1)) for name, value in graph.example.inputs.items()}
    fixed = open_axes(file.model, sizes) if pieces else {}
    model = SpliceOnnx(pieces, metadata, fixed)(file.model).program
    if model.ByteSize() > MAX_FILE:
        raise BuildError(f"the compiled model has {model.ByteSize():,} bytes, more than an ONNX file can", "use less")
    temporary(path).write_bytes(model.SerializeToString(deterministic=True))
    temporary(path).rename(path)
    places = {
        node.name: Place(site=piece.name)
        for piece in pieces
        for node in model.graph.node
        if node.name.startswith(piece.prefix)
    }
    return OnnxArtifact(path, opset, places)


def open_axes(model: Any, sizes: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """Return the sizes of those axes of the inputs that a file names but does not fix."""
    axes: dict[str, dict[int, int]] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        open_ones = {axis for axis, dim in enumerate(dims) if not dim.HasField("dim_value")}
        axes[value.name] = {axis: size for axis, size in sizes.get(value.name, {}).items() if axis in open_ones}
    return axes


class Cutter:
    """Cuts operators out of a rewritten graph, each as an ONNX model from values of the file to values of the file.

    Args:
        file: the file.
        graph: the same, captured.
        sites: of the graph.
        modules: operators by the site's name.
    """

    def __init__(
        self, file: OnnxModule, graph: CapturedGraph, sites: Sequence[Site], modules: Mapping[str, nn.Module]
    ) -> None:
        self.graph, self.opset = graph, opset_of(file.model)
        self.original = graph.program.module()
        self.values = {**graph.values, **values_outside(self.original.graph, file)}
        self.rewritten = RewriteSinkhorn(sites, modules)(graph.program.module()).program
        ends = {site.name: site.wiring.result.node for site in sites if site.name in modules}
        # An operator stands for the node that it replaced, under another name.
        self.targets = {name: f"asapc_{end}" for name, end in ends.items()}
        self.originals = {f"asapc_{end}": end for end in ends.values()}

    def pieces(self) -> list[Piece]:
        """Return the operators, without those of sites whose result nothing needs."""
        calls = {str(node.target): node for node in self.rewritten.graph.find_nodes(op="call_module")}
        return [self.piece(name, calls[target]) for name, target in self.targets.items() if target in calls]

    def piece(self, name: str, call: Node) -> Piece:
        """Return the operator of one site, with the steps up to the values of the file on both sides of it."""
        outputs = self.first_values(call)
        inputs, body = self.between(outputs, call)
        part = region_module(self.rewritten, inputs, body, outputs)
        proto = self.export(part, inputs)
        lower(proto, self.opset)
        return Piece(name, proto, self.values_of(inputs), self.values_of(outputs))

    def export(self, part: nn.Module, inputs: Sequence[Node]) -> Any:
        """Export a part of the graph as a ModelProto, on the values of its inputs in a run of the file's example."""
        names = [self.source(node) for node in inputs]
        tensors = record(self.original, self.graph.example, names)
        example = {f"value_{i}": tensors[name] for i, name in enumerate(names)}
        batch = Dim("batch", min=1)
        dims = tuple(
            dynamic(node.meta["val"].shape, tensors[name], len(self.graph.example), batch)
            for node, name in zip(inputs, names, strict=True)
        )
        program = export(part, example, dims=dims)
        return to_proto(CapturedGraph(program, Samples(example)), max(self.opset, OPSET))

    def source(self, node: Node) -> str:
        """Return the name of the node of the original graph that a node of the rewritten one computes."""
        return self.originals.get(str(node.target), node.name) if node.op == "call_module" else node.name

    def is_value(self, node: Node) -> bool:
        """Return whether a node computes a value of the file."""
        return self.source(node) in self.values

    def values_of(self, nodes: Iterable[Node]) -> tuple[str, ...]:
        """Return the names of the file's values that nodes compute."""
        return tuple(self.values[self.source(node)] for node in nodes)

    def first_values(self, call: Node) -> list[Node]:
        """Return the first nodes after an operator that compute values of the file; mostly the operator itself."""
        if self.is_value(call):
            return [call]
        values: set[Node] = set()
        visited: set[Node] = set()
        stack = list(call.users)
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            if self.is_value(node) and isinstance(node.meta.get("val"), Tensor):
                values.add(node)
            else:
                stack += node.users
        return sorted(values)

    def between(self, outputs: Sequence[Node], call: Node) -> tuple[list[Node], list[Node]]:
        """Return the file's values that outputs depend on, and the nodes in between, both in the graph's order."""
        inputs: set[Node] = set()
        body: set[Node] = set()
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node in body or node in inputs:
                continue
            if self.is_value(node) and node not in (call, *outputs):
                inputs.add(node)
            else:
                body.add(node)
                stack += node.all_input_nodes
        return sorted(inputs), sorted(body)


def values_outside(graph: Graph, file: OnnxModule) -> dict[str, str]:
    """Return the names of the file's inputs and constants, by the node of a captured graph that holds them."""
    inputs = graph.find_nodes(op="placeholder")
    names = {node.name: name for node, name in zip(inputs, file.input_names, strict=True)}
    constants = {node.name: file.initializers.get(node.target) for node in graph.find_nodes(op="get_attr")}
    return names | {node: name for node, name in constants.items() if name is not None}


def dynamic(shape: torch.Size, value: Tensor, batch: int, dim: Dim) -> dict[int, Any]:
    """Return which axes of a value grow with the batch: those of its length, and those of batch and heads in one."""
    return {
        axis: dim if value.shape[axis] == batch else (value.shape[axis] // batch) * dim
        for axis, size in enumerate(shape)
        if not isinstance(size, int)
    }


def lower(model: Any, opset: int) -> None:
    """Write an operator's model in an older opset, in place.

    Raises:
        BuildError: one of its nodes has no form there.
    """
    foreign = any(o.domain not in ("", "ai.onnx") for o in model.opset_import if o.version)
    if foreign and model.functions:
        raise BuildError("the operator was exported with functions of its own", "report the model")
    if opset < opset_of(model):
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            lower_node(node, opset, constants)
    drop_unread(model.graph)


def lower_node(node: Any, opset: int, constants: Mapping[str, Any]) -> None:
    """Write one node in an older opset, in place.

    Args:
        node: the node.
        opset: the opset.
        constants: the model's constants, TensorProtos, by name.

    Raises:
        BuildError: it has no form there.
    """
    import onnx

    schema = onnx.defs.get_schema(node.op_type, opset, "")
    if node.op_type.startswith("Reduce") and "axes" in schema.attributes and len(node.input) == 2:
        axes = onnx.numpy_helper.to_array(constants[node.input.pop()]).tolist()
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
    newer = [attribute for attribute in node.attribute if attribute.name not in schema.attributes]
    missing = {attribute.name for attribute in newer} - DROPPABLE
    for attribute in newer:
        node.attribute.remove(attribute)
    if missing or len(node.input) > schema.max_input or schema.deprecated:
        raise BuildError(f"{node.op_type} of the compiled operator has no form in opset {opset}", UPGRADE)


def drop_unread(graph: Any) -> None:
    """Drop the constants that no node reads, in place: axes that have become attributes."""
    inputs = {name for node in graph.node for name in node.input}
    for tensor in list(graph.initializer):
        if tensor.name not in inputs:
            graph.initializer.remove(tensor)
