"""Refuses models that draw random numbers in evaluation, such as a dropout that was left on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves

from asapc.capturing.compare import run, squares
from asapc.errors import CaptureError
from asapc.passes.find.describe import source_line
from asapc.types.samples import Samples

TOLERANCE = 1e-3  # how far random numbers may move the outputs, relative


def check_draws(program: ExportedProgram, example: Samples) -> None:
    """Raise CaptureError where random numbers that a graph draws change its outputs, which nothing can be fitted to."""
    if not any(may_draw(node) for node in program.graph.nodes):
        return
    module = program.module()
    first, second = (run(module, example, example) for _ in range(2))
    error, norm = squares(first, second)
    difference = (error / (norm or 1.0)) ** 0.5
    if difference > TOLERANCE:
        raise CaptureError(
            f"random numbers change the outputs by {difference:.1e} from run to run; they are drawn at "
            f"{', '.join(places(module, example))}",
            "draw them in training alone, as F.dropout(x, p, training=self.training) does",
        )


def may_draw(node: Node) -> bool:
    """Return whether a node may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def places(module: nn.Module, example: Samples) -> list[str]:
    """Return where a graph draws random numbers, by lines of code or, without these, by nodes."""
    redraw = Redraw(module)
    with torch.no_grad():
        redraw.run(*example.inputs.values(), enable_io_processing=False)
    return list(dict.fromkeys(source_line(node) or node.name for node in redraw.drawing))


class Redraw(Interpreter):
    """Runs a graph, and keeps the nodes that return something else for the same inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.drawing: list[Node] = []

    def run_node(self, n: Node) -> Any:
        """Run one node, and once more where it may draw random numbers."""
        value = super().run_node(n)
        if may_draw(n):
            pairs = zip(tree_leaves(value), tree_leaves(super().run_node(n)), strict=True)
            if not all(same(*pair) for pair in pairs):
                self.drawing.append(n)
        return value


def same(first: Any, second: Any) -> bool:
    """Return whether two results of a node are equal, NaN included."""
    return not isinstance(first, Tensor) or torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
