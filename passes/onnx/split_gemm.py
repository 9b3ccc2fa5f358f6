"""Takes products that add a constant apart for TensorRT's compiler, where they are half-steps on interleaved plans.

On a loop of those, each a product that adds the constant, a reshape and a division, TensorRT-RTX 1.7 takes four times
as long, and as much memory, with each half-step: hours after ten. Where the constant is added after the reshape it
builds the whole loop in a second. In ONNX Runtime one operation is faster than two. Only the compiler reads this model;
the user's file stays as it is.
"""

from collections import Counter
from typing import Any

from asapc.passes.base import GraphPass, PassResult
from asapc.passes.onnx.nodes import attributes_of

USUAL = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


class SplitGemm(GraphPass[Any]):
    """Adds the one constant of a reshaped Gemm of a ModelProto after the reshape, in place."""

    def call(self, program: Any) -> PassResult[Any]:
        """Put a product in the place of each such Gemm, and a sum behind what reshapes it."""
        from onnx.helper import make_node

        graph = program.graph
        single = {tensor.name for tensor in graph.initializer if all(size == 1 for size in tensor.dims)}
        uses = Counter(name for node in graph.node for name in node.input) + Counter(o.name for o in graph.output)
        reshaped = {node.input[0] for node in graph.node if node.op_type == "Reshape"}
        nodes: list[Any] = []
        constants: dict[str, str] = {}  # what is still to be added to a product, by its name
        for node in graph.node:
            name = node.output[0]
            if is_plain(node) and node.input[2] in single and uses[name] == 1 and name in reshaped:
                constants[name] = node.input[2]
                nodes.append(make_node("MatMul", node.input[:2], [name], name=node.name))
            elif node.op_type == "Reshape" and node.input[0] in constants:
                product = f"{name}_product"
                nodes.append(make_node("Reshape", node.input, [product], name=node.name))
                nodes.append(make_node("Add", [product, constants[node.input[0]]], [name], name=f"{node.name}_sum"))
            else:
                nodes.append(node)
        if constants:
            del graph.node[:]
            graph.node.extend(nodes)
        return PassResult(program, bool(constants))


def is_plain(node: Any) -> bool:
    """Return whether a node is a Gemm that adds an operand to the product of others as they are."""
    return node.op_type == "Gemm" and len(node.input) == 3 and USUAL | attributes_of(node) == USUAL
