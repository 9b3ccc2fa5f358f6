"""Keeps TensorRT's compiler from taking Sinkhorn for attention.

TensorRT-RTX 1.7 fuses a product, the exponential of it and a product with that, whatever is elementwise in between: a
scale, a mask, a dual. It crashes where it finds what attention does not have, as scaling loops do: an exponential that
is used more than once, or one that no sum divides. A bias that is computed at run time keeps the pattern from matching.
It is zero, as the answer to whether a number is below minus infinity, be it NaN or infinite itself. It crashes too
where keys and values are parts of one tensor, as of a projection to both, and queries are not: then what is taken from
that tensor gets the zero as well. Only the compiler reads this model; the user's file stays as it is.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from asapc.passes.base import GraphPass, PassResult

BIASED = "_biased"  # what the names of scores with a bias end with
LEAST, FLAT, BEGIN, END = "asapc_least", "asapc_flat", "asapc_begin", "asapc_end"
EXPONENTIALS = ("Exp", "LogSoftmax", "ReduceLogSumExp")  # what a softmax is spelled with where it is not one node
PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv")  # beyond which nothing is part of the pattern
# What takes numbers as they are.
MOVES = ("Reshape", "Transpose", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Identity")


class UnfuseAttention(GraphPass[Any]):
    """Adds a zero to the scores of every scaling loop of a ModelProto, in place. Plain attention stays as it is."""

    def call(self, program: Any) -> PassResult[Any]:
        """Put the bias between each product and what exponentiates it."""
        graph = program.graph
        constants = {tensor.name for tensor in graph.initializer}
        producers = {name: node for node in graph.node for name in node.output}
        uses = Counter(name for node in graph.node for name in node.input)
        scores = scores_of_loops(graph, producers, uses)
        nodes: list[Any] = []
        biased: dict[str, str] = {}  # names of scores with the bias, by those without
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = biased.get(name, name)
            if node.op_type == "MatMul" and node.output[0] in scores and not constants & set(node.input):
                biased[node.output[0]] = f"{node.output[0]}{BIASED}"
                nodes += with_zeros(node, parted_operands(node, producers, uses))
            else:
                nodes.append(node)
        if biased:
            del graph.node[:]
            graph.node.extend(nodes)
            graph.initializer.extend(constants_of_bias())
        return PassResult(program, bool(biased))


def scores_of_loops(graph: Any, producers: Mapping[str, Any], uses: Mapping[str, int]) -> set[str]:
    """Return the names of the products that are exponentiated, but for those of plain attention.

    That has a softmax of which the result is used once. Nor are those that have their bias.
    """
    kernels = [node for node in graph.node if node.op_type == "Softmax" and uses[node.output[0]] > 1]
    pending = [
        name for node in (*kernels, *(n for n in graph.node if n.op_type in EXPONENTIALS)) for name in node.input
    ]
    products: set[str] = set()
    visited: set[str] = set()
    while pending:
        name = pending.pop()
        node = producers.get(name)
        if node is None or name in visited:
            continue
        visited.add(name)
        if node.op_type in PRODUCTS:
            products |= set() if f"{name}{BIASED}" in producers else {name}
        else:
            pending += node.input
    return products


def parted_operands(product: Any, producers: Mapping[str, Any], uses: Mapping[str, int]) -> list[int]:
    """Return which operands of a product, 0 or 1, are parts of a tensor that others use, but not the other operand."""

    def sources(name: str) -> set[str]:
        found: set[str] = set()
        while name in producers and producers[name].op_type in MOVES:
            name = producers[name].input[0]
            found.add(name)
        return found

    of_operands = [sources(name) for name in product.input]
    if of_operands[0] & of_operands[1]:
        return []
    return [i for i, names in enumerate(of_operands) if any(uses[name] > 1 for name in names)]


def with_zeros(product: Any, operands: list[int]) -> list[Any]:
    """Return nodes of a product with a zero that is added to it, and before it to some of its operands.

    The zero says whether the first number of the left operand is below all numbers.
    """
    from onnx.helper import make_node

    scores, query = product.output[0], product.input[0]
    parts = ("numbers", "first", "least", "is_below", "nothing")
    numbers, first, least, is_below, nothing = (f"{scores}_{part}" for part in parts)
    nodes = [
        make_node("Reshape", [query, FLAT], [numbers]),
        make_node("Slice", [numbers, BEGIN, END], [first]),
        make_node("CastLike", [LEAST, first], [least]),
        make_node("Less", [first, least], [is_below]),
        make_node("CastLike", [is_below, first], [nothing]),
    ]
    for i in operands:
        nodes.append(make_node("Add", [product.input[i], nothing], [f"{scores}_operand_{i}"]))
        product.input[i] = f"{scores}_operand_{i}"
    return [*nodes, product, make_node("Add", [scores, nothing], [f"{scores}{BIASED}"])]


def constants_of_bias() -> list[Any]:
    """Return what all biases read, as TensorProtos: minus infinity, and what singles out the first number."""
    import numpy as np
    from onnx.numpy_helper import from_array

    numbers = {FLAT: -1, BEGIN: 0, END: 1}
    places = [from_array(np.array([number], np.int64), name) for name, number in numbers.items()]
    return [from_array(np.array(-np.inf, np.float32), LEAST), *places]
