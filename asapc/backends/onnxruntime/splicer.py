"""Writes a compiled ONNX file: the file itself, with operators in the place of its loops."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from asapc.backends.base import temporary
from asapc.backends.onnxruntime.builder import OPSET, to_proto
from asapc.capturing.export import export
from asapc.capturing.onnx import OnnxGraph, region_module
from asapc.errors import BuildError
from asapc.passes.onnx.splice import Piece, SpliceOnnx
from asapc.passes.record import record
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.types.artifacts import OnnxArtifact
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Site

UPGRADE = "convert it with onnx.version_converter.convert_version(model, 18), or export it anew with opset_version=18"
MAX_BYTES = 2**31 - 2**20  # bytes of a file of protobuf


def splice_onnx(
    graph: OnnxGraph, sites: Sequence[Site], modules: Mapping[str, nn.Module], path: Path, metadata: Mapping[str, str]
) -> OnnxArtifact:
    """Write an ONNX file with operators in the place of the sites that have one; all else of it stays as it is.

    Args:
        graph: the file.
        sites: what was found in it.
        modules: operators by the site's name.
        path: file to write; it appears whole or not at all.
        metadata: what the file says about its origin, besides what it says already.

    Raises:
        BuildError: an operator cannot be written in the file's opset, or the file grows beyond what ONNX can hold.
    """
    opset = max(o.version for o in graph.model.opset_import if o.domain in ("", "ai.onnx"))
    found = pieces(graph, sites, modules, opset)
    # A loop's operator is fitted to its tokens: an axis that the file leaves open is open no longer.
    sizes = {name: dict(enumerate(value.shape[1:], 1)) for name, value in graph.example.inputs.items()}
    model = SpliceOnnx(found, metadata, open_axes(graph.model, sizes) if found else {})(graph.model).program
    if model.ByteSize() > MAX_BYTES:
        raise BuildError(f"the compiled model has {model.ByteSize():,} bytes, more than an ONNX file can", "use less")
    temporary(path).write_bytes(model.SerializeToString(deterministic=True))
    temporary(path).rename(path)
    return OnnxArtifact(path, opset)


def open_axes(model: Any, sizes: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """Sizes of those axes of the inputs that a file names but does not fix."""
    found: dict[str, dict[int, int]] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        mine = sizes.get(value.name, {})
        found[value.name] = {a: s for a, s in mine.items() if a < len(dims) and not dims[a].HasField("dim_value")}
    return found


def pieces(graph: OnnxGraph, sites: Sequence[Site], modules: Mapping[str, nn.Module], opset: int) -> list[Piece]:
    """The operators as ONNX models, with the values of the file that they read and give."""
    if not modules:
        return []
    original = graph.program.module()
    values = {node.name: name for node in original.graph.nodes if (name := graph.value_of(node)) is not None}
    rewritten = RewriteSinkhorn(sites, modules)(graph.program.module()).program
    # An operator stands for the node that it replaced, under another name.
    stands = {f"asapc_{site.wiring.result.node}": site.wiring.result.node for site in sites if site.name in modules}
    names = {site.name: f"asapc_{site.wiring.result.node}" for site in sites if site.name in modules}

    def source(node: Node) -> str:
        return stands.get(str(node.target), node.name) if node.op == "call_module" else node.name

    made = []
    for site_name, target in names.items():
        call = next((node for node in rewritten.graph.nodes if node.target == target), None)
        if call is None:
            continue  # a site whose result nothing needs
        outputs = first_values(call, lambda node: source(node) in values)
        inputs, body = between(outputs, call, lambda node: source(node) in values)
        shapes = [node.meta["val"].shape for node in inputs]
        kept = record(original, graph.example, [source(node) for node in inputs])
        example = {f"value_{i}": kept[source(node)] for i, node in enumerate(inputs)}
        part = region_module(rewritten, inputs, body, outputs)
        batch = Dim("batch", min=1)
        dims = tuple(
            dynamic(shape, value, len(graph.example), batch)
            for shape, value in zip(shapes, example.values(), strict=True)
        )
        program = export(part, example, dims=dims)
        proto = to_proto(CapturedGraph(program, Samples(example)), max(opset, OPSET))
        lower(proto, opset)
        made.append(
            Piece(site_name, proto, tuple(values[source(n)] for n in inputs), tuple(values[source(n)] for n in outputs))
        )
    return made


def first_values(call: Node, is_value: Any) -> list[Node]:
    """The first nodes on all ways from an operator that make values of the file; the operator itself, mostly."""
    if is_value(call):
        return [call]
    found: dict[Node, None] = {}
    stack, seen = [call], {call}
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                if is_value(user) and isinstance(user.meta.get("val"), Tensor):
                    found[user] = None
                else:
                    stack.append(user)
    return sorted(found)


def between(outputs: Sequence[Node], call: Node, is_value: Any) -> tuple[list[Node], list[Node]]:
    """The values of the file that some nodes are made from, and the nodes in between, both in the graph's order."""
    inputs: set[Node] = set()
    body: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in body or node in inputs:
            continue
        if is_value(node) and node is not call and node not in outputs:
            inputs.add(node)
        else:
            body.add(node)
            stack += node.all_input_nodes
    return sorted(inputs), sorted(body)


def dynamic(shape: torch.Size, value: Tensor, batch: int, dim: Dim) -> dict[int, Any]:
    """Which axes of a value grow with the batch: those of its length, and those of batch and heads in one."""
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
    import onnx

    now = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if any(o.domain not in ("", "ai.onnx") for o in model.opset_import if o.version) and model.functions:
        raise BuildError("the operator was exported with functions of its own", "report the model")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node if opset < now else ():
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        if node.op_type.startswith("Reduce") and "axes" in schema.attributes and len(node.input) == 2:
            axes = onnx.numpy_helper.to_array(constants[node.input.pop()]).tolist()
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        for attribute in list(node.attribute):
            if (
                attribute.name in ("allowzero", "noop_with_empty_axes", "num_outputs")
                and attribute.name not in schema.attributes
            ):
                node.attribute.remove(attribute)
        known = all(attribute.name in schema.attributes for attribute in node.attribute)
        if not known or len(node.input) > schema.max_input or schema.deprecated:
            raise BuildError(f"{node.op_type} of the compiled operator has no form in opset {opset}", UPGRADE)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in list(model.graph.initializer):
        if tensor.name not in read:
            model.graph.initializer.remove(tensor)
