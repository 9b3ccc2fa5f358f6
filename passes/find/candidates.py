"""Proposes, by structure alone, where a graph may hold Sinkhorn loops; `sinkhorn.py` judges.

A plan may stand wherever a matrix is consumed: multiplied, returned, sorted. A few views and elementwise steps may
stand between. The loop may start from any earlier node of the same shape, back to the learned layers or to the
product that computes the scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from asapc.passes.find.kinds import (
    EXTREMES,
    KERNELS,
    LAYERS,
    ORDERINGS,
    SAME_VALUES,
    STATISTICS,
    depends_on,
    is_constant,
    is_cut,
    is_elementwise,
    is_matrix,
    is_mixing,
    is_reduction,
    is_view,
    maker,
    makes_scores,
    packet_of,
    size_of,
)
from asapc.passes.find.products import Product, as_product, shape_of
from asapc.passes.find.regions import descend
from asapc.passes.layout import follow_axes, positions
from asapc.types.graph import hint

aten = torch.ops.aten
MAX_STEPS = 6  # views and elementwise steps that may stand between a plan and its use
MAX_STARTS = 16  # nodes of the plan's shape that are tried as scores, from the first on


@dataclass(frozen=True)
class Use:
    """A node that consumes a matrix, and the path from the matrix to it, the matrix first."""

    user: Node
    path: tuple[Node, ...]


@dataclass(frozen=True)
class PlanCandidate:
    """A matrix that may be a plan.

    Attributes:
        plan: the node.
        starts: nodes of its shape that its loop may start from, in the order of the graph.
        region: what the plan depends on, back to layers and to products that compute scores.
        side_inputs: what the region reads and no start contributes to: masks, biases, temperatures.
        uses: what consumes it.
        cut: whether its matrices are only a part of those of the model, see `crop.py`.
    """

    plan: Node
    starts: tuple[Node, ...]
    region: frozenset[Node]
    side_inputs: frozenset[Node]
    uses: tuple[Use, ...]
    cut: bool = False

    @property
    def evidence(self) -> set[Node]:
        """Nodes whose values are needed to judge the candidate."""
        return {self.plan, *self.starts, *self.side_inputs}


def propose(graph: Graph) -> Iterator[PlanCandidate]:
    """Yield all candidates, in the order of the graph."""
    uses: dict[Node, list[Use]] = {}
    for node in graph.nodes:
        for user, operand in matrix_operands(node):
            for path in paths_to(operand):
                uses.setdefault(path[0], []).append(Use(user, path))
    for plan in graph.nodes:
        if plan in uses and (candidate := trace_back(plan, uses[plan])) is not None:
            yield candidate


def matrix_operands(node: Node) -> list[tuple[Node, Node]]:
    """Return the matrices that a node consumes, as pairs of node and operand; for `(a * b).sum()`, of `a * b` and a.

    A sum of a matrix alone is a step of a loop; its largest entries are what matchers read.
    """
    operands = list(dict.fromkeys(node.all_input_nodes))
    if node.op == "output":
        return [(node, operand) for operand in operands]
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return []
    if is_reduction(node) and not is_lookup(node):
        return factors_of_sum(maker(operands[0]))
    if is_elementwise(node) or is_view(node):
        return []
    return [(node, operand) for operand in operands]


def is_lookup(node: Node) -> bool:
    """Return whether a node takes the largest entries of a matrix, and not to take them off again or to mask it."""
    if packet_of(node) not in EXTREMES:
        return False
    size, stack, visited = size_of(node.all_input_nodes[0]), [node], set[Node]()
    while stack:
        for user in set(stack.pop().users) - visited:
            if is_matrix(user) and size_of(user) == size:
                return False
            visited.add(user)
            stack.append(user)
    return True


def factors_of_sum(factor: Node) -> list[tuple[Node, Node]]:
    """Return an elementwise product that a reduction reads, paired with each of its factors that may be a plan."""
    if factor.target is not aten.mul.Tensor or len(factor.all_input_nodes) != 2:
        return []
    left, right = factor.all_input_nodes
    if size_of(left) == size_of(right):  # costs of a transport
        return [(factor, left), (factor, right)]
    # Within a loop one factor depends on the other: the scaling vector on the kernel.
    return [
        (factor, one)
        for one, other in ((left, right), (right, left))
        if size_of(one) != size_of(factor) and not depends_on(one, other)
    ]


def paths_to(operand: Node) -> Iterator[tuple[Node, ...]]:
    """Yield paths to an operand from nodes before it, through views and elementwise steps that keep the size."""
    # Breadth first, so that the shortest path to a node comes up first.
    paths: list[tuple[Node, ...]] = [(operand,)] if may_carry(operand) else []
    visited: set[Node] = set()
    while paths:
        path = paths.pop(0)
        if path[0] not in visited:
            visited.add(path[0])
            if is_matrix(path[0]):
                yield path
            if len(path) <= MAX_STEPS:
                paths += [(source, *path) for source in carried_inputs(path[0])]


def may_carry(node: Node) -> bool:
    """Return whether a node is a matrix, or tells which entries of one are large."""
    return is_matrix(node) or packet_of(node) in ORDERINGS


def carried_inputs(node: Node) -> list[Node]:
    """Return the matrices that a view or an elementwise step passes on: as a whole, or in part where it is a cut."""
    if not (is_view(node) or is_elementwise(node)):
        return []
    return [n for n in node.all_input_nodes if may_carry(n) and (size_of(n) == size_of(node) or is_cut(node))]


def trace_back(plan: Node, uses: Sequence[Use]) -> PlanCandidate | None:
    """Return the candidate whose plan is a node; None if nothing before it could normalise a plan."""
    region, closure = walk_back(plan)
    starts = find_starts(plan, region, closure)
    products = [product for node in sorted(region) if (product := score_product(node)) is not None]
    after = descend({*starts, *(product.node for product in products)}, sorted(region))
    if not starts or not any(is_mixing(node) for node in after):
        return None
    side_inputs = closure - after - set(starts)
    for product in products:
        side_inputs |= scaling_inputs(product.left) | scaling_inputs(product.right)
    return PlanCandidate(plan, tuple(starts), frozenset(region), frozenset(side_inputs), tuple(uses))


def walk_back(plan: Node) -> tuple[set[Node], set[Node]]:
    """Return what a plan depends on, back to layers and score products of its size; and the same with its inputs."""
    region: set[Node] = set()
    closure = {plan}
    stack = [plan]
    while stack:
        node = stack.pop()
        if node in region or node.op != "call_function" or not node.all_input_nodes:
            continue
        region.add(node)
        product = makes_scores(node) and size_of(node) == size_of(plan)
        if node.target not in LAYERS and not product:  # what lies before these is no part of the loop
            closure |= set(node.all_input_nodes)
            stack += node.all_input_nodes
    return region, closure


def find_starts(plan: Node, region: set[Node], closure: set[Node]) -> list[Node]:
    """Return the first nodes of a plan's shape that its loop may start from, in the order of the graph."""
    late = inside_loop(plan, region) | {plan}
    alike = [n for n in sorted(closure) if is_matrix(n) and shape_of(n) == shape_of(plan)]
    starts = [n for n in alike if n not in late]
    # With a constant in it a softmax is no half-step: the loop starts after it.
    raised = (n for n in alike if n in late and is_raised(n) and not late & set(kernel_of(n).all_input_nodes))
    return [*starts[:MAX_STARTS], *islice(raised, 1)]


def is_raised(node: Node) -> bool:
    """Return whether a node adds a constant to exponentials of scores, or to their softmax."""
    return packet_of(node) is aten.add and packet_of(kernel_of(node)) in KERNELS and is_offset(node)


def kernel_of(node: Node) -> Node:
    """Return what makes the tensor that a node adds to."""
    return maker(node.all_input_nodes[0])


def is_offset(node: Node) -> bool:
    """Return whether a node adds one number to a tensor."""
    first, second = node.args[:2]
    return not isinstance(second, Node) or (size_of(second) == "1" and is_constant(second) and isinstance(first, Node))


def score_product(node: Node) -> Product | None:
    """Return the score product that a node computes; None for any other node."""
    return as_product(node) if makes_scores(node) else None


def inside_loop(plan: Node, region: set[Node]) -> set[Node]:
    """Return the nodes of a region that depend on a sum over a matrix of the plan's size: no loop starts there."""
    size, ordered = size_of(plan), sorted(region)
    products = {node for node in region if makes_scores(node) and size_of(node) == size}
    # What is summed before the scores is no step: queries, for their norms, may happen to have the plan's size.
    after = descend(products, ordered) if products else region
    sums = {node for node in after if is_sum(node) and any(size_of(n) == size for n in node.all_input_nodes)}
    return sums | descend(sums, ordered)


def is_sum(node: Node) -> bool:
    """Return whether a node may be a step of a loop: it sums over axes and is no statistic and no score product."""
    return is_mixing(node) and packet_of(node) not in STATISTICS and not makes_scores(node)


def scaling_inputs(operand: Node) -> set[Node]:
    """Return the constants by which the steps of `scaling_chain` multiply."""
    chain = scaling_chain(operand)
    return {n for node in chain[1:] for n in node.all_input_nodes} - set(chain)


def scaling_chain(operand: Node) -> list[Node]:
    """Return the path to an operand of views and multiplications by constants; its first node is unscaled."""
    path = [operand]
    while True:
        node = path[0]
        matrices = [n for n in node.all_input_nodes if is_matrix(n)]
        # Learned queries depend on no input at all; what scales them is smaller.
        varying = [n for n in matrices if not is_constant(n)] or [
            n for n in matrices if len(matrices) == 1 or size_of(n) == size_of(node)
        ]
        scales = node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.neg.default)
        if not (is_view(node) or scales) or len(varying) != 1 or node.target is aten.cat.default:
            return path
        path.insert(0, varying[0])


def example_shape(node: Node) -> tuple[int, ...]:
    """Return the shape of a node's value when the graph was captured."""
    return tuple(hint(size) for size in node.meta["val"].shape)


def carry(path: Sequence[Node]) -> Tensor | None:
    """Send positions in the first node of a path to its last node; return None if the path mixes values.

    Elementwise steps pass positions on unchanged.
    """
    places = positions(example_shape(path[0]))
    for before, node in pairwise(path):
        if is_view(node) and node.target not in SAME_VALUES:
            result = apply_view(node, before, places)
            if result is None:
                return None
            places = result
        if tuple(places.shape) != example_shape(node):
            return None
    return places


def apply_view(view: Node, source: Node, tensor: Tensor) -> Tensor | None:
    """Apply a view to a tensor instead of to its source; return None if it reads other tensors or cannot run."""

    def argument(node: Node) -> Any:
        if node is source:
            return tensor
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            raise LookupError
        return hint(value)

    try:
        args, kwargs = map_arg((view.args, view.kwargs), argument)
        operator: Any = view.target
        result = operator(*args, **kwargs)
    except (LookupError, RuntimeError, TypeError):
        return None
    return result if isinstance(result, Tensor) else None


def carried_axes(path: Sequence[Node], axes: str) -> str | None:
    """Return the letters of the axes of a path's last node, given those of its first; None if they are lost."""
    places = carry(path)
    return None if places is None else follow_axes(places, axes, example_shape(path[0]))
