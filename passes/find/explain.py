"""Explains the nodes between the scores of a loop and its plan: each has to be a step that a Sinkhorn loop consists of.

Numbers alone cannot tell a loop from one that does something else on other inputs: a clamp that does not act on the
samples, a temperature that is taken from the batch. So the probe's verdict counts only where the region computes an
analytic function of its scores, and of nothing else that changes with the model's inputs but masks. Two such functions
that agree around random scores agree everywhere.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.find.describe import source_line
from asapc.passes.find.kinds import SIZES_ONLY, is_constant, is_mixing, is_view
from asapc.passes.find.regions import Region

aten = torch.ops.aten
PRODUCTS = {aten.matmul, aten.mv, aten.mm, aten.bmm, aten.baddbmm, aten.einsum}
SMOOTH = {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.reciprocal, aten.pow, aten.sqrt, aten.rsqrt),
    *(aten.square, aten.exp, aten.exp2, aten.log, aten.log2, aten.logaddexp, aten.true_divide),
    *(aten.sum, aten.mean, aten.logsumexp, aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax),
    *(aten.norm, aten.linalg_vector_norm, aten.outer, *PRODUCTS),
}
# They move entries about, or put others in their place.
MOVING = {
    *(
        aten.index,
        aten.index_put,
        aten.index_select,
        aten.gather,
        aten.constant_pad_nd,
        aten.slice_scatter,
        aten.select_scatter,
    ),
    *(aten.copy, aten.where, aten.masked_fill, aten.nan_to_num, aten.alias, aten.detach, aten.expand_as, aten.fill),
    *(aten.diag_embed, aten.diag, aten.diagonal, aten.constant_pad_nd),
    *(aten.lift_fresh_copy, aten.cat, aten.stack, aten.repeat, aten.tile, aten.zeros_like, aten.full_like),
}
# What is taken off scores; numbers show whether that is all that is done with it.
SHIFTS = {aten.amax, aten.amin, aten.max, aten.min, aten.abs}
CONDITIONS = {
    *(aten.isinf, aten.isnan, aten.isfinite, aten.isneginf, aten.isposinf, aten.any, aten.all),
    *(aten.logical_not, aten.logical_and, aten.logical_or, aten.bitwise_not, aten.bitwise_and, aten.bitwise_or),
}
COMPARISONS = {aten.eq, aten.ne, aten.gt, aten.ge, aten.lt, aten.le}
DIVISIONS = {aten.reciprocal, aten.rsqrt, aten.log, aten.log2}
MAX_GUARD = 1e-4  # of a constant that keeps a divisor from zero
BOUNDLESS = 1e6  # duals as large are those of masked entries
# In the place of a guard: no sum is as small, so that only divisions of zero by zero still see it.
TINY = 1e-290


@dataclass(frozen=True, eq=False)
class Explanation:
    """How a region is made up.

    Attributes:
        ideal: arguments of the nodes that keep a divisor from zero, by node, with TINY for their constant.
        reductions: how many of its nodes sum over a matrix or vector: no fewer than it has half-steps.
        unexplained: the first node that is no step of a loop; None where there is none.
    """

    ideal: Mapping[Node, tuple[Any, ...]]
    reductions: int
    unexplained: Node | None


def explain(region: Region) -> Explanation:
    """Explain a region node by node."""
    ideal = {node: args for node in region.nodes if (args := without_guard(node, region.inputs)) is not None}
    unexplained = (node for node in region.nodes if node not in ideal and not is_step(node, region.inputs))
    reductions = sum(is_mixing(node) or packet_of(node) in PRODUCTS for node in region.nodes)
    return Explanation(ideal, reductions, next(unexplained, None))


def foreign_inputs(region: Region) -> Iterator[Node]:
    """Yield what a region reads that changes with the model's inputs, or with their number, and is no mask."""
    for node, value in sorted(region.inputs.items()):
        if isinstance(value, Tensor) and not is_constant(node) and not is_mask(value):
            yield node


def is_mask(value: Tensor) -> bool:
    """Return whether a tensor tells apart two kinds of entries: by true and false, 1 and 0, or 0 and very negative."""
    if value.numel() == 1:
        return False  # one answer for a whole batch
    if not value.is_floating_point():
        return True
    return bool(((value == 0) | (value == 1)).all()) or bool(((value == 0) | (value < MIN_LIVE)).all())


def is_step(node: Node, inputs: Mapping[Node, Any]) -> bool:
    """Return whether a node is a step of a Sinkhorn loop, as far as it alone shows."""
    if not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return True  # a size
    packet = packet_of(node)
    if packet in COMPARISONS:
        return is_check(node, inputs)
    if packet in SMOOTH:
        # A number that follows the inputs' sizes is one number for this batch alone.
        return all(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)
    known = SHIFTS | MOVING | CONDITIONS | SIZES_ONLY
    return packet in known or node.target is operator.getitem or is_view(node)


def is_check(node: Node, inputs: Mapping[Node, Any]) -> bool:
    """Return whether a comparison asks for what is zero or masked, and for no other threshold."""
    limit = constant_of(node.args[1], inputs)
    return limit is not None and (limit in (0.0, -inf, inf) or limit <= MIN_LIVE or limit >= BOUNDLESS)


def without_guard(node: Node, inputs: Mapping[Node, Any]) -> tuple[Any, ...] | None:
    """Return the arguments of a node that keeps a divisor from zero, with TINY for its constant; None for others."""
    packet = packet_of(node)
    if packet not in (aten.add, aten.clamp, aten.clamp_min, aten.maximum) or node.kwargs or len(node.args) < 2:
        return None
    if packet is aten.clamp and node.args[2:] not in ((), (None,)):
        return None  # it has an upper limit too
    for place, other in ((0, 1), (1, 0)):
        total, constant = node.args[place], constant_of(node.args[other], inputs)
        if isinstance(total, Node) and constant is not None and 0 < constant <= MAX_GUARD and is_total(total):
            if not is_divisor(node):
                return None
            limit = node.args[other]
            tiny = inputs[limit].new_tensor(TINY) if isinstance(limit, Node) else TINY
            return tuple(tiny if i == other else argument for i, argument in enumerate(node.args))
    return None


def packet_of(node: Node) -> Any:
    """Return the operator that a node calls, whichever its overload; None for what is none of torch's."""
    return getattr(node.target, "overloadpacket", None)


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
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return is_mixing(node)


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
    if packet is aten.pow:
        return user.args[0] is node and isinstance(user.args[1], int | float) and user.args[1] < 0
    return packet in DIVISIONS


def name_of(node: Node) -> str:
    """Return what a node does and where, for a message."""
    line = source_line(node)
    packet = packet_of(node)
    return f"{str(packet or node.name).removeprefix('aten.')}{f' at {line}' if line else ''}"
