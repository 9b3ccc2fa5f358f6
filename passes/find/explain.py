"""Explains the nodes between the scores of a loop and its plan: each has to be a step that a Sinkhorn loop consists of.

Numbers alone cannot tell a loop from one that does something else on other inputs: a clamp that does not act on the
samples, a temperature that is taken from the batch. So the probe's verdict counts only where the region computes an
analytic function of its scores, and of nothing else that changes with the model's inputs but masks. Two such functions
that agree around random scores agree everywhere.
"""

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.find.describe import source_line
from asapc.passes.find.kinds import (
    EXTREMES,
    KERNELS,
    ORDERINGS,
    SIZES_ONLY,
    is_constant,
    is_mixing,
    is_view,
    maker,
    packet_of,
)
from asapc.passes.find.regions import Region
from asapc.types.site import Floor

aten = torch.ops.aten
JOINS = {aten.cat, aten.stack}
PRODUCTS = {aten.matmul, aten.mv, aten.mm, aten.bmm, aten.baddbmm, aten.einsum}
# Sums of exponentials that stay in range whatever the scores.
LOG_SUMS = {aten.logsumexp, aten.log_softmax, aten._log_softmax}
NORMS = {aten.norm, aten.linalg_vector_norm}
SMOOTH = {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.reciprocal, aten.exp, aten.exp2, aten.log),
    *(aten.log2, aten.true_divide, aten.sum, aten.mean, aten.softmax, aten._softmax, aten.outer, *LOG_SUMS, *PRODUCTS),
}
# They move entries about, or put others in their place.
MOVING = {
    *(aten.index, aten.index_put, aten.index_select, aten.gather, aten.slice_scatter, aten.select_scatter, aten.fill),
    *(aten.copy, aten.where, aten.masked_fill, aten.alias, aten.detach, aten.expand_as, aten.constant_pad_nd),
    *(aten.diag_embed, aten.diag, aten.diagonal, aten.lift_fresh_copy, *JOINS, aten.repeat, aten.tile),
}
CONDITIONS = {
    *(aten.isinf, aten.isnan, aten.isfinite, aten.isneginf, aten.isposinf, aten.any, aten.all),
    *(aten.logical_not, aten.logical_and, aten.logical_or, aten.bitwise_not, aten.bitwise_and, aten.bitwise_or),
}
COMPARISONS = {aten.eq, aten.ne, *ORDERINGS}
DIVISIONS = {aten.reciprocal, aten.log, aten.log2}
# What leaves a logarithm one, or a positive number one, apart from constants that it adds.
OF_LOGARITHMS = {aten.add, aten.sub, aten.rsub, aten.neg, aten.where, aten.masked_fill, aten.nan_to_num, aten.index_put}
OF_POSITIVES = {aten.mul, aten.div, aten.reciprocal, aten.where, aten.masked_fill, aten.nan_to_num, *EXTREMES}
BOUNDLESS = 1e6  # duals as large are those of masked entries
FACTORIES = {aten.zeros, aten.ones, aten.full, aten.empty, aten.eye}
# Replaces a guard. No sum is as small, so that only divisions of zero by zero still see it.
TINY = 1e-290


@dataclass(frozen=True, eq=False)
class Explanation:
    """How a region is made up.

    Attributes:
        ideal: arguments of the nodes that keep a divisor from zero, by node, with TINY for their constant.
        floors: their constants.
        reductions: how many of its nodes sum over a matrix or vector: no fewer than it has half-steps.
        in_range: whether it stays in range on any scores, since it takes logarithms of sums at once.
        unexplained: the first node that does not belong to a loop; None where there is none.
    """

    ideal: Mapping[Node, tuple[Any, ...]]
    floors: Collection[Floor]
    reductions: int
    in_range: bool
    unexplained: Node | None


def explain(region: Region) -> Explanation:
    """Explain a region node by node."""
    guards = {node: guard for node in region.nodes if (guard := read_guard(node, region.inputs)) is not None}
    ideal = {node: args for node, (_, args) in guards.items()}
    floors = {Floor(constant, packet_of(node) is not aten.add) for node, (constant, _) in guards.items()}
    unexplained = (node for node in region.nodes if node not in ideal and not is_step(node, region))
    sums = [node for node in region.nodes if is_mixing(node) or packet_of(node) in PRODUCTS]
    # Where a comparison tells masked entries by their size, live ones must not get as small.
    compared = any(packet_of(node) in COMPARISONS for node in region.nodes)
    in_range = not compared and all(packet_of(node) in LOG_SUMS | EXTREMES for node in sums)
    return Explanation(ideal, floors, len(sums), in_range, next(unexplained, None))


def foreign_inputs(region: Region) -> Iterator[Node]:
    """Yield what a region reads that changes with the model's inputs, or with their number, and is no mask."""
    for node, value in sorted(region.inputs.items()):
        if isinstance(value, Tensor) and not is_fixed(node) and not (is_mask(value) and not is_constant(node)):
            yield node


def is_fixed(node: Node) -> bool:
    """Return whether a node's values are the same whatever the model's inputs, and however many they are."""
    if not is_constant(node):
        return False
    stack, visited = [node], set[Node]()
    while stack:
        node = stack.pop()
        if node in visited or node.op != "call_function":
            continue
        visited.add(node)
        packet = packet_of(node)
        sizes = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), Tensor)]
        if packet in SIZES_ONLY | FACTORIES:
            if any(isinstance(argument, Node) for argument in fill_values(node)):
                return False
        elif (sizes and not is_view(node)) or (is_mixing(node) and any(has_open_axis(n) for n in node.all_input_nodes)):
            return False
        else:
            stack += [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return True


def fill_values(node: Node) -> tuple[Any, ...]:
    """Return the arguments of a node that makes a tensor by its size which are no sizes."""
    sizes = 2 if "new_" in str(node.target) else 1
    return (*node.args[sizes:], *(value for name, value in node.kwargs.items() if name == "fill_value"))


def has_open_axis(node: Node) -> bool:
    """Return whether an axis of a node's value has a length that the model leaves open."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(not isinstance(size, int) for size in value.shape)


def is_mask(value: Tensor) -> bool:
    """Return whether a tensor tells apart two kinds of entries: by true and false, 1 and 0, or 0 and very negative."""
    if value.numel() == 1:
        return False  # one answer for a whole batch
    if not value.is_floating_point():
        return True
    return bool(((value == 0) | (value == 1)).all()) or bool(((value == 0) | (value < MIN_LIVE)).all())


def is_step(node: Node, region: Region) -> bool:
    """Return whether a node is a step of a Sinkhorn loop, as far as it alone shows."""
    if not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return True  # a size
    packet = packet_of(node)
    if packet in COMPARISONS:
        return is_check(node, region)
    if packet is aten.add and len(node.args) > 1 and any(constant_of(a, region.inputs) for a in node.args[:2]):
        return not any(isinstance(a, Node) and is_positive(a, region) for a in node.args[:2])
    if packet in SMOOTH:
        # A number that follows the inputs' sizes is one number for this batch alone.
        return all(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)
    if packet in NORMS:
        return len(node.args) > 1 and bool(node.args[1] == 1)  # of positive numbers: their sum
    if packet is aten.pow:
        return bool(node.args[1] == -1)
    if packet in EXTREMES:  # numbers show whether they are taken off scores; a limit that is joined to them hides
        return len(node.all_input_nodes) == 1 and packet_of(maker(node.all_input_nodes[0])) not in JOINS
    if packet is aten.logaddexp:
        return all(n in region.nodes for n in node.all_input_nodes)
    if packet is aten.nan_to_num:  # a kernel out of range is not made a large number
        return packet_of(maker(node.all_input_nodes[0])) is not aten.exp
    if packet in SIZES_ONLY:
        return not any(isinstance(argument, Node) for argument in fill_values(node))
    return packet in MOVING | CONDITIONS or node.target is operator.getitem or is_view(node)


def is_check(node: Node, region: Region) -> bool:
    """Return whether a comparison asks for what is zero, infinite or masked, and for no other threshold."""
    limit, compared = constant_of(node.args[1], region.inputs), node.args[0]
    if limit is None or not isinstance(compared, Node):
        return False
    if limit in (-inf, inf):
        return True
    if limit == 0:
        return is_positive(compared, region)
    far = limit <= MIN_LIVE or limit >= BOUNDLESS
    return far and comes_from(compared, region, OF_LOGARITHMS | {aten.mul, aten.div}, LOG_SUMS | {aten.log})


def is_positive(node: Node, region: Region) -> bool:
    """Return whether a node holds a kernel or a plan, sums of them, or vectors that scale them."""
    start = {region.start} if region.exponential else set()
    return comes_from(node, region, OF_POSITIVES, KERNELS | PRODUCTS | {aten.sum} | start)


def comes_from(node: Node, region: Region, through: Collection[Any], sources: Collection[Any]) -> bool:
    """Return whether all that a node is computed from in its region are nodes of some kinds, by steps of others.

    The start counts as a logarithm: it holds scores.
    """
    stack, visited = [node], set[Node]()
    while stack:
        node = stack.pop()
        packet = packet_of(node)
        outside = node not in region.nodes and node is not region.start
        if node in visited or outside or node in sources or packet in sources:
            continue
        visited.add(node)
        if node is region.start:
            if aten.log not in sources:
                return False
        elif is_view(node) or packet in through or packet in SIZES_ONLY or node.target is operator.getitem:
            stack += node.all_input_nodes
        else:
            return False
    return True


def read_guard(node: Node, inputs: Mapping[Node, Any]) -> tuple[float, tuple[Any, ...]] | None:
    """Return the constant by which a node keeps a divisor from zero, and its arguments with TINY instead; else None."""
    packet = packet_of(node)
    if packet not in (aten.add, aten.clamp, aten.clamp_min, aten.maximum) or node.kwargs or len(node.args) < 2:
        return None
    if packet is aten.clamp and node.args[2:] not in ((), (None,)):
        return None  # it has an upper limit too
    for place, other in ((0, 1), (1, 0)):
        total, constant = node.args[place], constant_of(node.args[other], inputs)
        if isinstance(total, Node) and constant is not None and 0 < constant < inf and is_total(total):
            if not is_divisor(node):
                return None
            limit = node.args[other]
            tiny = inputs[limit].new_tensor(TINY) if isinstance(limit, Node) else TINY
            return constant, tuple(tiny if i == other else argument for i, argument in enumerate(node.args))
    return None


def constant_of(argument: Any, inputs: Mapping[Node, Any]) -> float | None:
    """Return the number that an argument is, as it stands or as a constant tensor of one; None for anything else."""
    if isinstance(argument, Node):
        value = inputs.get(argument)
        if not isinstance(value, Tensor) or value.numel() != 1 or not is_constant(argument):
            return None
        argument = value.item()
    return float(argument) if isinstance(argument, int | float) else None


def is_total(node: Node) -> bool:
    """Return whether a node is a sum over an axis, seen through views."""
    return is_mixing(maker(node))


def is_divisor(node: Node) -> bool:
    """Return whether all that reads a node, through views, divides by it or takes its logarithm."""
    return all(
        is_divisor(user)
        if is_view(user) or (packet_of(user) is aten.expand_as and user.args[0] is node)
        else divides(user, node)
        for user in node.users
    )


def divides(user: Node, node: Node) -> bool:
    """Return whether a node divides by another, or takes its logarithm."""
    packet = packet_of(user)
    if packet is aten.div:
        return user.args[1] is node and user.args[0] is not node
    return packet in DIVISIONS or (packet is aten.pow and user.args[0] is node and bool(user.args[1] == -1))


def name_of(node: Node) -> str:
    """Return what a node does and where, for a message."""
    line = source_line(node)
    packet = packet_of(node)
    return f"{str(packet or node.name).removeprefix('aten.')}{f' at {line}' if line else ''}"
