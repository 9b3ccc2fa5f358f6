"""Tells what normalises a matrix over two axes by turns, as Sinkhorn loops do, whatever else is done at each turn."""

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any

from torch.fx import Node

from asapc.passes.find.candidates import PlanCandidate, carried_axes, is_sum
from asapc.passes.find.kinds import is_view
from asapc.passes.find.products import as_product, shape_of

ALTERNATES = 10  # how much nearer to a loop a plan is that does so


def alternates(candidate: PlanCandidate, least: int = 3) -> bool:
    """Return whether a plan depends on a sum over one axis, which depends on one over another, and by turns so on.

    Layers of other kinds come this far too rarely to matter: norms sum over the same axes again, and gates take both
    sums of the same matrix.

    Args:
        candidate: the plan.
        least: how many such sums: 2, or 3.
    """
    if sum(map(is_sum, candidate.region)) < least:  # tells most; on long sequences letters take time
        return False
    axes: dict[Node, str] = {}  # a letter for each axis of the plan
    turns: dict[Node, str] = {}  # axes of the sums on the way to a node, each followed by another
    for node in sorted(candidate.region.union(candidate.starts)):
        turn = max((turns.get(n, "") for n in node.all_input_nodes), key=len, default="")
        axis = summed_axis(node, axes)
        turns[node] = turn if turn.endswith(axis) else turn + axis
        letters = passed_on(node, axes)
        if letters is not None:
            axes[node] = letters
        elif node in candidate.starts:
            axes[node] = ascii_lowercase[: len(shape_of(node) or ())]
    turn = turns[candidate.plan]
    if least == 2:
        return len(turn) > 1
    return any(axis == third for axis, third in zip(turn, turn[2:], strict=False))


def passed_on(node: Node, axes: Mapping[Node, str]) -> str | None:
    """Return the letters of a node's axes where it moves the entries of a matrix, or puts others in their place."""
    for source in node.all_input_nodes:
        if source in axes and is_view(node):
            return carried_axes((source, node), axes[source])
        if source in axes and shape_of(source) == shape_of(node) and as_product(node) is None:
            return axes[source]
    return None


def summed_axis(node: Node, axes: Mapping[Node, str]) -> str:
    """Return the letter of the axis of a matrix that a node sums over; nothing where it is none or several."""
    if not is_sum(node):
        return ""
    if product := as_product(node):
        sides = (product.left, product.left_axes), (product.right, product.right_axes)
        letters = {name: axis for side, names in sides for name, axis in zip(names, axes.get(side, ""), strict=False)}
        summed = "".join(letters.get(name, "") for name in product.contracted)
    else:
        names = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]
        arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        dim, own = arguments.get("dim"), axes.get(node.all_input_nodes[0], "")
        dims = [dim] if isinstance(dim, int) else dim or []
        summed = "".join(own[dim] for dim in dims) if own else ""
    summed = summed.replace("1", "")
    return summed if len(summed) == 1 else ""
