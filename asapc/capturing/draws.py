"""Refuses models that draw random numbers in evaluation, such as a dropout that was left on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from asapc.capturing.compare import squares
from asapc.errors import CaptureError
from asapc.passes.find.describe import source_line
from asapc.types.samples import Samples

TOLERANCE = 1e-3  # how far random numbers may move the outputs, relative


def check_draws(program: ExportedProgram, example: Samples) -> None:
    """Raise CaptureError where random numbers that a graph draws change its outputs, which nothing can be fitted to.

    Of branches, those count that draw, whichever the example takes.
    """
    if not draws(program.graph_module):
        return
    redraw = Redraw(program.module())
    first, second = (redraw.outputs(example) for _ in range(2))
    error, norm = squares(first, second)
    difference = (error / (norm or 1.0)) ** 0.5
    if difference > TOLERANCE:
        places = dict.fromkeys(source_line(node) or node.name for node in redraw.drawing)
        raise CaptureError(
            f"random numbers change the outputs by {difference:.1e} from run to run; they are drawn at "
            f"{', '.join(places)}",
            "draw them in training alone, as F.dropout(x, p, training=self.training) does",
        )


def draws(module: GraphModule) -> list[Node]:
    """List the nodes that may draw random numbers, also those of branches and of bodies of loops."""
    graphs = [inner.graph for inner in module.modules() if isinstance(inner, GraphModule)]
    return [node for graph in graphs for node in graph.nodes if may_draw(node)]


def may_draw(node: Node) -> bool:
    """Return whether a node may draw random numbers itself."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class Redraw(Interpreter):
    """Runs a graph, through branches that draw, and keeps the nodes that return something else for the same inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.drawing: list[Node] = []

    def outputs(self, example: Samples) -> list[Tensor]:
        """Return all floating outputs, in float64."""
        with torch.no_grad():
            leaves = tree_leaves(self.run(*example.inputs.values(), enable_io_processing=False))
        return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def run_node(self, n: Node) -> Any:
        """Run one node, and once more where it may draw random numbers."""
        value = super().run_node(n)
        if drawing := self.draws_of(n):
            pairs = zip(tree_leaves(value), tree_leaves(super().run_node(n)), strict=True)
            if not all(same(*pair) for pair in pairs):
                self.drawing += drawing
        return value

    def draws_of(self, node: Node) -> list[Node]:
        """List the nodes by which a node may draw: itself, or what is in its branches."""
        if may_draw(node):
            return [node]
        bodies = [self.fetch_attr(str(part.target)) for part in node.all_input_nodes if part.op == "get_attr"]
        return [inner for body in bodies if isinstance(body, GraphModule) for inner in draws(body)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Take the first branch that draws, if one does."""
        if target is torch.ops.higher_order.cond:
            _, *branches, operands = args
            for branch in branches:
                if draws(branch):
                    return branch(*operands)
        return super().call_function(target, args, kwargs)


def same(first: Any, second: Any) -> bool:
    """Return whether two results of a node are equal, NaN included."""
    return not isinstance(first, Tensor) or torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
