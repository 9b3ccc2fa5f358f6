"""Tells apart the kinds of nodes that matter to the search for plans."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from asapc.passes.find.products import as_product, named_sizes

aten = torch.ops.aten
SIZE = "asapc_size"  # metadata: a cache of `size_of`
# Learned layers: what lies before one belongs to another attention.
LAYERS = {
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.embedding.default,
    aten.layer_norm.default,
}
# Views that torch does not tag as such.
UNTAGGED = {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten._unsafe_view.default,
    aten.cat.default,
    aten.stack.default,
    aten.repeat_interleave.self_int,
    aten.chunk.default,
}
# Operators that return their input as it is: dropout does in evaluation mode, and a cast keeps positions.
SAME_VALUES = {aten.clone.default, aten._to_copy.default, aten.to.dtype, aten.dropout.default, aten.contiguous.default}
# Elementwise operators of which torch tags some overloads only, or none.
ELEMENTWISE = {aten.where, aten.multiply, aten.divide, aten.subtract, aten.negative}
DIAGONALS = {aten.diag_embed.default, aten.diag.default}
KERNELS = {aten.exp, aten.softmax, aten._softmax}  # what holds exponentials of scores
EXTREMES = {aten.amax, aten.amin, aten.max, aten.min}
ORDERINGS = {aten.gt, aten.ge, aten.lt, aten.le}
REDUCTIONS = {
    *EXTREMES,
    aten.sum,
    aten.mean,
    aten.logsumexp,
    aten.norm,
    aten.linalg_vector_norm,
    aten.softmax,
    aten._softmax,
    aten.log_softmax,
    aten._log_softmax,
    aten.cumsum,
    aten.any,
    aten.all,
    aten.prod,
    aten.var,
    aten.std,
    aten.isclose,
}
# Operators that read the size of their input and not its values.
SIZES_ONLY = {
    aten.sym_size,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
}
# What scores may be shifted or scaled by before a loop, but no step of one.
STATISTICS = {
    *(aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean, aten.std_mean),
    *(aten.any, aten.all, aten.isclose),
}


def makes_scores(node: Node) -> bool:
    """Return whether a node is a product of two tensors that each bring an axis to the result, as queries and keys do.

    A matrix times a vector or a diagonal matrix is not: those stand inside loops.
    """
    product = as_product(node)
    return (
        product is not None
        and product.contracted != ""
        and brings_axis(product.left, product.left_axes, product.only("left"))
        and brings_axis(product.right, product.right_axes, product.only("right"))
    )


def brings_axis(operand: Node, axes: str, own: str) -> bool:
    """Return whether an operand of a product has an axis of its own, longer than 1, and is not diagonal."""
    sizes = named_sizes(operand, axes)
    while (source := view_source(operand)) is not None:
        operand = source
    return operand.target not in DIAGONALS and any(sizes.get(a) != "1" for a in own)


def view_source(node: Node) -> Node | None:
    """Return the tensor that a node views; None for a node that is no view, or joins several tensors."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return tensors[0] if is_view(node) and len(tensors) == 1 else None


def is_matrix(node: Node) -> bool:
    """Return whether a node is a floating tensor of two axes or more."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point()


def is_elementwise(node: Node) -> bool:
    """Return whether a node computes each entry from the entries at the same position."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet_of(node) in ELEMENTWISE


def is_view(node: Node) -> bool:
    """Return whether a node moves entries about without changing them."""
    return bool(getattr(node.target, "is_view", False)) or node.target in UNTAGGED | SAME_VALUES


def packet_of(node: Node) -> Any:
    """Return the operator that a node calls, whichever its overload; None for what is none of torch's."""
    return getattr(node.target, "overloadpacket", None)


def is_reduction(node: Node) -> bool:
    """Return whether a node reduces over axes."""
    return packet_of(node) in REDUCTIONS


def is_mixing(node: Node) -> bool:
    """Return whether a node could normalise: it sums over axes, itself or as a product."""
    return is_reduction(node) or as_product(node) is not None


def maker(node: Node) -> Node:
    """Return the node that computes what a chain of views, dropout among them, passes on."""
    while (source := view_source(node)) is not None:
        node = source
    return node


def size_of(node: Node) -> str | None:
    """Return the symbolic number of entries, as text."""
    if SIZE not in node.meta:
        value = node.meta.get("val")
        node.meta[SIZE] = str(value.numel()) if isinstance(value, Tensor) else None
    size: str | None = node.meta[SIZE]
    return size


def is_cut(node: Node) -> bool:
    """Return whether a node takes a part of a matrix: a plan without its dustbins, say."""
    return node.target in (aten.slice.Tensor, aten.select.int, aten.narrow.default)


def is_constant(node: Node) -> bool:
    """Return whether a node depends on no values of the model's inputs; it may depend on their sizes."""
    stack, visited = [node], set[Node]()
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return False
        if node not in visited and packet_of(node) not in SIZES_ONLY:
            visited.add(node)
            stack += node.all_input_nodes
    return True


def depends_on(node: Node, source: Node) -> bool:
    """Return whether a node depends on another."""
    stack, visited = [node], set[Node]()
    while stack:
        node = stack.pop()
        if node is source:
            return True
        if node not in visited and node > source:  # nothing before the source depends on it
            visited.add(node)
            stack += node.all_input_nodes
    return False
