"""Writes ONNX's own attention as the operators that it consists of, for TensorRT's compiler.

TensorRT-RTX 1.7 has kernels for that operator in half precision alone, for heads of at most 256 numbers, without a cap
on scores or a cache. It crashes where queries and keys turn out to be one tensor, whatever names and views they have,
and refuses keys that are scaled queries. It builds the parts in all of these cases, and fuses those of plain attention
again where it has a kernel for them.
"""

from collections.abc import Mapping
from typing import Any

from asapc.passes.base import GraphPass, PassResult
from asapc.passes.onnx.nodes import Parts, attributes_of, opset_of, types_of

ATTENTION = ("", "Attention")  # domain and name
SWAP, TURN = [0, 2, 1, 3], [0, 1, 3, 2]  # tokens with heads, tokens with numbers


class InlineAttention(GraphPass[Any]):
    """Replaces ONNX's attention in a ModelProto, in place; its parts are called NODE/PART."""

    def call(self, program: Any) -> PassResult[Any]:
        """Replace every such node of the graph of which the types are known."""
        graph = program.graph
        if not any(is_attention(node) for node in graph.node):
            return PassResult(program, False)
        types = types_of(program)
        opset = opset_of(program)
        nodes = [part for node in graph.node for part in parts_of(node, types, opset) or [node]]
        modified = len(nodes) > len(graph.node)
        del graph.node[:]
        graph.node.extend(nodes)
        return PassResult(program, modified)


def is_attention(node: Any) -> bool:
    """Return whether a node is the operator of the standard."""
    return (node.domain, node.op_type) == ATTENTION


def parts_of(node: Any, types: Mapping[str, Any], opset: int) -> list[Any]:
    """Return the nodes that attention consists of; none of another node, and none where a type is unknown."""
    if not is_attention(node) or not all(name in types for name in node.input if name):
        return []
    return plain(node, types) or definition(node, types, opset)


def plain(node: Any, types: Mapping[str, Any]) -> list[Any]:
    """Return a product, a softmax and a product; none where there is more, as a mask, or fewer heads of keys."""
    attributes = attributes_of(node)
    # Of all options but the scale zero stands for what is not there.
    options = {name: value for name, value in attributes.items() if value or name == "scale"}
    q, k, v = node.input[:3]
    sizes, sizes_of_keys = ([size.dim_value for size in types[name].tensor_type.shape.dim] for name in (q, k))
    heads = options.pop("q_num_heads", 0)  # where they are not an axis of their own
    counts = (heads, options.pop("kv_num_heads", 0)) if heads else (*sizes[1:2], *sizes_of_keys[1:2])
    size = sizes[-1] // (heads or 1) if sizes else 0  # as all sizes 0 where it is unknown
    scale = options.pop("scale", size and size**-0.5)
    more = options or any(node.input[3:]) or len(node.output) > 1
    if more or not scale or len(counts) < 2 or not counts[0] == counts[1] > 0:
        return []
    parts = Parts(node)
    add = parts.add
    if heads:
        split = add("Constant", [], "split", value_ints=[0, 0, heads, -1])
        for part, name in (("q", q), ("k", k), ("v", v)):
            add("Transpose", [add("Reshape", [name, split], f"{part}_split")], part, perm=SWAP)
        q, k, v = (f"{parts.owner}/{part}" for part in ("q", "k", "v"))
    factor = add("CastLike", [add("Constant", [], "scale", value_float=scale), q], "factor")
    scores = add("MatMul", [add("Mul", [q, factor], "scaled"), add("Transpose", [k], "turned", perm=TURN)], "scores")
    output = add("MatMul", [add("Softmax", [scores], "plan", axis=-1), v], "output")
    if heads:
        shape = add("Constant", [], "shape", value_ints=[0, 0, -1])
        add("Reshape", [add("Transpose", [output], "tokens", perm=SWAP), shape], "merged")
    return parts.in_place()


def definition(node: Any, types: Mapping[str, Any], opset: int) -> list[Any]:
    """Return the nodes of the standard's own definition, a function of types and attributes."""
    import onnx

    owner = node.name or node.output[0]
    kinds = [types[name].SerializeToString() if name else b"" for name in node.input]
    schema = onnx.defs.get_schema(node.op_type, opset)
    text = schema.get_context_dependent_function_with_opset_version(opset, node.SerializeToString(), kinds)
    function = onnx.FunctionProto.FromString(text)
    names = dict(zip(function.input, node.input, strict=False)) | dict(zip(function.output, node.output, strict=False))
    for part in function.node:
        part.name = f"{owner}/{part.output[0]}"
        for field in (part.input, part.output):
            field[:] = [name and (names.get(name) or f"{owner}/{name}") for name in field]
    return list(function.node)
