"""Writes ONNX's own attention as the operators by which the standard defines it, for TensorRT's compiler.

TensorRT-RTX 1.7 has kernels for that operator in half precision alone, and for heads of at most 256 numbers. It crashes
where queries and keys turn out to be one tensor. What the operator consists of, it builds in all of these cases.
"""

from typing import Any

from asapc.passes.base import GraphPass, PassResult

ATTENTION = ("", "Attention")  # domain and name


class InlineAttention(GraphPass[Any]):
    """Replaces ONNX's attention in a ModelProto by its definition; nodes of it are called NODE/VALUE."""

    def call(self, program: Any) -> PassResult[Any]:
        """Replace every such node whose types are known, which the definition depends on."""
        from onnx.inliner import inline_selected_functions

        nodes = {name: node for node in program.graph.node for name in node.output}
        if not any(is_attention(node) for node in nodes.values()):
            return PassResult(program, False)
        model = inline_selected_functions(program, [ATTENTION], inline_schema_functions=True)
        owner = None
        for node in reversed(model.graph.node):  # the first output is what a definition ends with
            origin = nodes.get(node.output[0])
            owner = origin or owner
            if node != origin and owner is not None and is_attention(owner):
                part = node.output[0].rpartition("/")[2]
                node.name = f"{owner.name or owner.output[0]}/{part}"
        return PassResult(model, model != program)


def is_attention(node: Any) -> bool:
    """Return whether a node is the operator of the standard."""
    return (node.domain, node.op_type) == ATTENTION
