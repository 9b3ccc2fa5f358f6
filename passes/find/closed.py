"""Tells loops and branches of torch's own kind, such as while_loop: one node, which no candidate reaches into."""

from collections.abc import Iterator
from math import inf

from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from asapc.passes.find.candidates import is_sum
from asapc.passes.find.describe import source_line
from asapc.passes.find.kinds import is_matrix
from asapc.types.site import Miss


def closed_misses(graph: Graph) -> Iterator[Miss]:
    """Yield a miss for each node that runs graphs of its own which sum over matrices, as the loops sought do."""
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and any(normalises(inner) for inner in nodes_within(node)):
            yield Miss(
                node.name,
                source_line(node),
                f"asapc does not look into what {str(node.target).removesuffix('_impl')} runs, which may be a Sinkhorn "
                "loop",
                "write it as a Python loop of a fixed number of steps; of a branch, compute both sides and choose with "
                "torch.where",
                nearness=inf,  # ahead of all that was looked into
            )


def nodes_within(node: Node) -> Iterator[Node]:
    """Yield the nodes of all graphs that a node runs."""
    for source in node.all_input_nodes:
        body = getattr(node.graph.owning_module, str(source.target), None)
        for part in body.modules() if isinstance(body, GraphModule) else ():
            if isinstance(part, GraphModule):
                yield from part.graph.nodes


def normalises(node: Node) -> bool:
    """Return whether a node sums over a matrix."""
    return is_sum(node) and any(is_matrix(n) for n in node.all_input_nodes)
