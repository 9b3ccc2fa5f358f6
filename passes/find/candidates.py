"""Proposes, by structure alone, where a graph may hold Sinkhorn loops; `sinkhorn.py` judges.

A plan is looked for wherever a matrix is used up: multiplied, returned, sorted. A few views and elementwise steps may
stand between. What it may have been made from are the nodes of its own shape before it, back to the learned
layers, or to the product that made the scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from asapc.passes.find.kinds import (
    EXTREMES,
    LAYERS,
    SAME_VALUES,
    depends_on,
    is_constant,
    is_cut,
    is_elementwise,
    is_matrix,
    is_mixing,
    is_reduction,
    is_view,
    makes_scores,
    size_of,
)
from asapc.passes.find.products import as_product, shape_of
from asapc.passes.find.regions import descend
from asapc.passes.layout import follow_axes, positions

aten = torch.ops.aten
MAX_STEPS = 6  # views and elementwise steps that may stand between a plan and its use
MAX_STARTS = 16  # nodes of the plan's shape that are tried as scores, from the first on


@dataclass(frozen=True)
class Use:
    """A node that uses a matrix up, and the nodes that carry it there, the matrix itself first."""

    user: Node
    path: tuple[Node, ...]


@dataclass(frozen=True)
class Candidate:
    """A matrix that may be a plan.

    Attributes:
        plan: the node.
        starts: nodes of its shape that it may have been made from, in the order of the graph.
        region: what the plan depends on, back to layers and to products that make scores.
        given: what the region reads and no start takes part in: masks, biases, temperatures.
        uses: what uses it up.
    """

    plan: Node
    starts: tuple[Node, ...]
    region: frozenset[Node]
    given: frozenset[Node]
    uses: tuple[Use, ...]

    @property
    def needed(self) -> set[Node]:
        """Nodes whose values it takes to judge the candidate."""
        return {self.plan, *self.starts, *self.given}


def propose(graph: Graph) -> Iterator[Candidate]:
    """Yield all candidates, in the order of the graph."""
    uses: dict[Node, list[Use]] = {}
    for node in graph.nodes:
        for user, operand in used_up(node):
            for path in paths_to(operand):
                uses.setdefault(path[0], []).append(Use(user, path))
    for plan in graph.nodes:
        if plan in uses and (candidate := trace_back(plan, uses[plan])) is not None:
            yield candidate


def used_up(node: Node) -> list[tuple[Node, Node]]:
    """What ends as a matrix in a node: pairs of the node and an operand; of `(a * b).sum()`, the `a * b` and a."""
    operands = list(dict.fromkeys(node.all_input_nodes))
    if node.op == "output":
        return [(node, operand) for operand in operands]
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return []
    if not is_reduction(node):
        return [] if is_elementwise(node) or is_view(node) else [(node, operand) for operand in operands]
    factor = operands[0]
    factors = factor.all_input_nodes
    if factor.target is not aten.mul.Tensor or len(factors) != 2:
        return []
    # Within a loop one factor is made of the other, the scaling vector of the kernel.
    return [(factor, a) for a, b in (factors, factors[::-1]) if size_of(a) != size_of(factor) and not depends_on(a, b)]


def paths_to(operand: Node) -> Iterator[tuple[Node, ...]]:
    """Ways to an operand from nodes before it, through views and elementwise steps that keep the size."""
    paths: list[tuple[Node, ...]] = [(operand,)] if is_matrix(operand) else []
    seen: set[Node] = set()
    while paths:
        path = paths.pop(0)
        node = path[0]
        if node in seen:
            continue
        seen.add(node)
        yield path
        if len(path) <= MAX_STEPS and (is_view(node) or is_elementwise(node)):
            paths += [
                (n, *path)
                for n in node.all_input_nodes
                if is_matrix(n) and (size_of(n) == size_of(node) or is_cut(node))
            ]


def trace_back(plan: Node, uses: Sequence[Use]) -> Candidate | None:
    """The candidate that ends in a node; None if nothing in it could normalise a plan."""
    region: set[Node] = set()
    reached = {plan}
    stack = [plan]
    while stack:
        node = stack.pop()
        if node in region or node.op != "call_function" or not node.all_input_nodes:
            continue
        region.add(node)
        if node.target not in LAYERS and not (makes_scores(node) and size_of(node) == size_of(plan)):
            reached |= set(node.all_input_nodes)
            stack += node.all_input_nodes
    starts = [n for n in sorted(reached) if n is not plan and is_matrix(n) and shape_of(n) == shape_of(plan)]
    late = under_way(plan, region)
    starts = [n for n in starts if n not in late][:MAX_STARTS]
    ordered = sorted(region)
    after = descend({*starts, *(n for n in region if makes_scores(n))}, ordered)
    if not starts or not any(is_mixing(node) for node in after):
        return None
    given = reached - after - set(starts)
    for product in (as_product(node) for node in region if makes_scores(node)):
        if product is not None:
            for path in (scaling_chain(product.left), scaling_chain(product.right)):
                given |= {n for node in path[1:] for n in node.all_input_nodes} - set(path)
    return Candidate(plan, tuple(starts), frozenset(region), frozenset(given), tuple(uses))


def under_way(plan: Node, region: set[Node]) -> set[Node]:
    """Nodes of a region that sums over a matrix of the plan's size went into: a loop does not start there."""
    found: set[Node] = set()
    for node in sorted(region):
        inputs = node.all_input_nodes
        sums = is_mixing(node) and getattr(node.target, "overloadpacket", None) not in EXTREMES
        over_matrix = sums and not makes_scores(node) and any(size_of(n) == size_of(plan) for n in inputs)
        if over_matrix or any(n in found for n in inputs):
            found.add(node)
    return found


def scaling_chain(operand: Node) -> list[Node]:
    """Nodes up to an operand that only move it about or multiply it by constants, the first of them unscaled."""
    path = [operand]
    while True:
        node = path[0]
        varying = [n for n in node.all_input_nodes if not is_constant(n) and is_matrix(n)]
        scaled = node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.neg.default)
        if not (is_view(node) or scaled) or len(varying) != 1 or node.target is aten.cat.default:
            return path
        path.insert(0, varying[0])


def example_shape(node: Node) -> tuple[int, ...]:
    """Shape that a node's value had when the graph was captured."""
    return tuple(concrete(size) for size in node.meta["val"].shape)


def concrete(size: Any) -> int:
    """Number behind a symbolic size at capture."""
    return size if isinstance(size, int) else int(size.node.hint)


def carry(path: Sequence[Node]) -> Tensor | None:
    """Positions in the first node of a path, as the last node has them; None if values are mixed on the way.

    Elementwise steps count as carrying what they read.
    """
    seen = positions(example_shape(path[0]))
    for before, node in pairwise(path):
        if is_view(node) and node.target not in SAME_VALUES:

            def argument(n: Node) -> Any:
                if n is before:  # noqa: B023
                    return seen  # noqa: B023
                value = n.meta.get("val")
                if isinstance(value, Tensor):
                    raise LookupError
                return concrete(value)

            try:
                args, kwargs = map_arg((node.args, node.kwargs), argument)
                operator: Any = node.target
                seen = operator(*args, **kwargs)
            except (LookupError, RuntimeError, TypeError):
                return None
        if not isinstance(seen, Tensor) or tuple(seen.shape) != example_shape(node):
            return None
    return seen


def carried_axes(path: Sequence[Node], axes: str) -> str | None:
    """Letters of the axes of a path's last node, by those of its first."""
    seen = carry(path)
    return None if seen is None else follow_axes(seen, axes, example_shape(path[0]))
