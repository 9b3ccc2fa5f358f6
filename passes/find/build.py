"""Builds plans that a model applies without ever building them: a * (K @ (b * v)) becomes (a * K * b) @ v.

Code that keeps scaling vectors often stops there: it scales the values, multiplies by the kernel and scales the
result, so that there is no plan for the finder to look at. Whether a plan that was built is Sinkhorn is still the
finder's to say; where it is not, the graph stays as it was.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from asapc.passes.base import GraphPass, PassResult, PreconditionError
from asapc.passes.find.evidence import find_with_evidence
from asapc.passes.find.kinds import SIZE
from asapc.passes.find.products import SHAPE
from asapc.passes.find.unbuilt import Scaling, Unbuilt, find_unbuilt, find_unbuilt_equation
from asapc.passes.layout import align, loosen_views
from asapc.types.graph import CapturedGraph, with_graph
from asapc.types.samples import Samples

OF_VALUES = ("val", "tensor_meta", SHAPE, SIZE)  # metadata that describes a node's value, not its origin


def build_plans(graph: CapturedGraph, samples: Samples) -> CapturedGraph:
    """Build the plans that a graph applies without building, where they are Sinkhorn; else return the graph itself.

    Args:
        graph: the captured model; it is not changed.
        samples: what the finder may look at, see `find_with_evidence`.
    """
    products: Collection[str] | None = None  # all, to begin with; then those whose plan turned out to be Sinkhorn
    while True:
        build = BuildPlan(products)
        result = build(copy.deepcopy(graph.program.graph_module))
        if not result.modified:
            return graph
        rebuilt = replace(graph, program=with_graph(graph.program, result.program))
        plans = {site.wiring.plan.node for site in find_with_evidence(rebuilt, samples).sites}
        products = {product for product, plan in build.plans.items() if plan in plans}
        if products == set(build.plans):
            return rebuilt


class BuildPlan(GraphPass[GraphModule]):
    """Moves scaling vectors from values and results onto the matrix between them, in place.

    The scaled matrix is traced, all else are copies of nodes that were there. The node that held the scaled result
    stays, and keeps its name and metadata: it computes the same from the plan.

    Args:
        products: names of the products whose plan is to be built; None for all.

    Attributes:
        plans: after a call, the names of the plans by those of the products.
    """

    def __init__(self, products: Collection[str] | None = None) -> None:
        self.products = products
        self.plans: dict[str, str] = {}

    def requires(self, program: GraphModule) -> None:
        """Check that the graph records the shapes of its values, as captured graphs do."""
        if not all("val" in node.meta for node in program.graph.find_nodes(op="placeholder")):
            raise PreconditionError("the graph was not captured: its nodes have no example values")

    def call(self, program: GraphModule) -> PassResult[GraphModule]:
        """Build every plan that can be built."""
        self.plans = {}
        for node in list(program.graph.nodes):  # a copy, since building adds nodes
            if self.products is not None and node.name not in self.products:
                continue
            for find in (find_unbuilt_equation, find_unbuilt):  # what is left of an einsum may be scaled outside it
                if (unbuilt := find(node)) is not None:
                    self.plans[node.name] = build(program.graph, unbuilt).name
        if self.plans:
            program.graph.eliminate_dead_code()
            program.recompile()
        return PassResult(program, bool(self.plans))

    def ensures(self, program: GraphModule) -> None:
        """Check that the graph is sound."""
        program.graph.lint()


class Scaled(nn.Module):
    """A matrix multiplied or divided by its scalings; a module, so that it can be traced."""

    def __init__(self, scalings: Sequence[Scaling]) -> None:
        super().__init__()
        self.scalings = scalings

    def forward(self, matrix: Tensor, *factors: Tensor) -> Tensor:
        """Return the plan of a matrix (...) and the factors of all scalings, in the layouts of the graph."""
        for scaling, factor in zip(self.scalings, factors, strict=True):
            aligned = align(factor, scaling.axes, scaling.target)
            matrix = matrix / aligned if scaling.divides else matrix * aligned
        return matrix


def build(graph: Graph, unbuilt: Unbuilt) -> Node:
    """Build a plan, let it replace the product or its scaled result, and return it."""
    end = (unbuilt.product, *unbuilt.result)[-1]

    def recompute(steps: Sequence[Node], substitutes: Mapping[Node, Node]) -> Node:
        """Copy some steps without the scalings that move, reading substitutes for some nodes; return the last copy."""
        copies = dict(substitutes)
        for node in steps:
            if node in unbuilt.bypass:
                copies[node] = copies.get(unbuilt.bypass[node], unbuilt.bypass[node])
            elif node not in copies:
                copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
        return copies[steps[-1]]

    with graph.inserting_before(end):
        plan = trace(graph, Scaled(unbuilt.scalings), unbuilt)
        matrix = recompute(unbuilt.matrix, {unbuilt.matrix[0]: plan})
        values = recompute(unbuilt.values, {unbuilt.values[0]: unbuilt.values[0]})
        product = recompute([unbuilt.product], {unbuilt.matrix[-1]: matrix, unbuilt.values[-1]: values})
        if unbuilt.equation is not None:
            product.args = (unbuilt.equation, [matrix, values])
        last = recompute((unbuilt.product, *unbuilt.result), {unbuilt.product: product})
    # The end keeps its name, which other code may refer to, and is computed from the plan from now on.
    end.target, end.args, end.kwargs = last.target, last.args, last.kwargs
    graph.erase_node(last)
    loosen_views(plan)
    return plan


def trace(graph: Graph, module: nn.Module, unbuilt: Unbuilt) -> Node:
    """Trace a module into a graph, applied to a matrix and its factors, under the source line of the product."""
    inputs = (unbuilt.matrix[0], *(scaling.factor for scaling in unbuilt.scalings))
    traced = make_fx(module, tracing_mode="symbolic")(*(node.meta["val"] for node in inputs)).graph
    origin = {key: value for key, value in unbuilt.product.meta.items() if key not in OF_VALUES}
    for node in traced.nodes:
        node.meta = origin | {key: value for key, value in node.meta.items() if key in OF_VALUES}
    placeholders = traced.find_nodes(op="placeholder")
    result = graph.graph_copy(traced, dict(zip(placeholders, inputs, strict=True)))
    assert isinstance(result, Node)
    return result
