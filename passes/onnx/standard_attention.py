"""Writes ONNX Runtime's attention in standard operators, for compilers that support no others.

TensorRT fuses the product, softmax and product again, where it has a kernel for them.
"""

from typing import Any

from asapc.passes.base import GraphPass, PassResult
from asapc.passes.onnx.nodes import attributes_of

DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"


class StandardAttention(GraphPass[Any]):
    """Replaces attention of one head without scale, as asapc's own export writes it, in a ModelProto, in place."""

    def call(self, program: Any) -> PassResult[Any]:
        """Replace every such node."""
        import onnx

        nodes: list[Any] = []
        modified = False
        for node in program.graph.node:
            if not is_plain(node):
                nodes.append(node)
                continue
            modified = True
            queries, keys, values = node.input
            (output,) = node.output
            turned, scores, plan = (f"{output}_{part}" for part in ("keys", "scores", "plan"))
            make, name = onnx.helper.make_node, node.name or output  # a compiler names its layers after these
            nodes += [
                make("Transpose", [keys], [turned], f"{name}/keys", perm=[0, 2, 1]),
                make("MatMul", [queries, turned], [scores], f"{name}/scores"),
                make("Softmax", [scores], [plan], f"{name}/plan", axis=-1),
                make("MatMul", [plan, values], [output], f"{name}/output"),
            ]
        if modified:
            del program.graph.node[:]
            program.graph.node.extend(nodes)
            domains = {node.domain for node in nodes}
            imports = [o for o in program.opset_import if o.domain != DOMAIN or DOMAIN in domains]
            del program.opset_import[:]
            program.opset_import.extend(imports)
        return PassResult(program, modified)


def is_plain(node: Any) -> bool:
    """Return whether a node is attention of one head, with products for scores."""
    of_operator = (node.domain, node.op_type) == (DOMAIN, OPERATOR) and len(node.input) == 3
    return of_operator and attributes_of(node) == {"num_heads": 1, "scale": 1.0}
