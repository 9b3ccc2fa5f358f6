"""Keeps TensorRT's compiler from taking Sinkhorn for attention.

Where the exponential of a product of two tensors is used more than once, as a scaling loop uses its kernel,
TensorRT-RTX 1.7 starts to fuse attention, finds more users than attention has, and crashes. A bias that is computed at
run time keeps the pattern from matching. It is zero: the sum of one operand, times 0. Only the compiler reads this
model; the user's file stays as it is.
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
        graph = program.graph
        constants = {tensor.name for tensor in graph.initializer}
        exponentiated = exponentiated_values(graph)
        nodes: list[Any] = []
        biased: dict[str, str] = {}  # names of scores with the bias, by those without
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = biased.get(name, name)
            nodes.append(node)
            product = node.op_type == "MatMul" and not constants & set(node.input)
            if product and node.output[0] in exponentiated:
                bias = zero_bias(node)
                nodes += bias
                biased[node.output[0]] = bias[-1].output[0]
        if biased:
            del graph.node[:]
            graph.node.extend(nodes)
            graph.initializer.extend(constants_of_bias())
        return PassResult(program, bool(biased))


def exponentiated_values(graph: Any) -> set[str]:
    """Return the names of the scores of each softmax whose result is used more than once, or that is several nodes."""
    uses = Counter(name for node in graph.node for name in node.input)
    kernels = [node for node in graph.node if node.op_type == "Softmax" and uses[node.output[0]] > 1]
    return {node.input[0] for node in [*kernels, *(n for n in graph.node if n.op_type in EXPONENTIALS)]}


def zero_bias(product: Any) -> list[Any]:
    """Build nodes that add the sum of a product's right operand, times 0, to the product; the last is the result."""
    from onnx.helper import make_node

    scores, key = product.output[0], product.input[1]
    total, nothing, biased = (f"{scores}_{part}" for part in ("sum", "nothing", "biased"))
    return [
        make_node("ReduceSum", [key, AXIS], [total], keepdims=1),
        make_node("CastLike", [ZERO, total], [f"{nothing}_factor"]),
        make_node("Mul", [total, f"{nothing}_factor"], [nothing]),
        make_node("Add", [scores, nothing], [biased]),
    ]


def constants_of_bias() -> list[Any]:
    """Return the zero and the axis that all biases read, as TensorProtos."""
    import numpy as np
    from onnx.numpy_helper import from_array

    return [from_array(np.zeros((), np.float32), ZERO), from_array(np.array([-2], np.int64), AXIS)]
