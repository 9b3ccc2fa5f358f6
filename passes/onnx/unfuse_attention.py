"""Keeps TensorRT's compiler from taking Sinkhorn for attention.

Where the exponential of a product of two tensors is used more than once, as a scaling loop uses its kernel,
TensorRT-RTX 1.7 starts to fuse attention, finds more users than attention has, and crashes. A bias that is made at run
time keeps the pattern from matching. It is zero: the sum of one operand, times 0. This is for the compiler alone; the
file that users get is left as it is.
"""

from collections import Counter
from typing import Any

from asapc.passes.base import GraphPass, PassResult

ZERO, AXIS = "asapc_zero", "asapc_axis"
EXPONENTIALS = ("LogSoftmax", "ReduceMax")  # what a softmax is spelled with where it is not one node


class UnfuseAttention(GraphPass[Any]):
    """Adds a zero to the scores of every scaling loop of a ModelProto, in place. Plain attention stays as it is."""

    def call(self, program: Any) -> PassResult[Any]:
        """Put the bias between each product and what exponentiates it."""
        import onnx

        graph = program.graph
        uses = Counter(name for node in graph.node for name in node.input)
        constants = {tensor.name for tensor in graph.initializer}
        exponentiated = {
            node.input[0]
            for node in graph.node
            if node.op_type in EXPONENTIALS or (node.op_type == "Softmax" and uses[node.output[0]] > 1)
        }
        nodes: list[Any] = []
        biased: dict[str, str] = {}
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = biased.get(name, name)
            nodes.append(node)
            product = node.op_type == "MatMul" and not constants & set(node.input)
            if not product or node.output[0] not in exponentiated:
                continue
            scores, key = node.output[0], node.input[1]
            total, nothing, biased[scores] = (f"{scores}_{part}" for part in ("sum", "nothing", "biased"))
            nodes += [
                onnx.helper.make_node("ReduceSum", [key, AXIS], [total], keepdims=1),
                onnx.helper.make_node("CastLike", [ZERO, total], [f"{nothing}_factor"]),
                onnx.helper.make_node("Mul", [total, f"{nothing}_factor"], [nothing]),
                onnx.helper.make_node("Add", [scores, nothing], [biased[scores]]),
            ]
        if biased:
            import numpy as np

            del graph.node[:]
            graph.node.extend(nodes)
            graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), ZERO))
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([-2], np.int64), AXIS))
        return PassResult(program, bool(biased))
