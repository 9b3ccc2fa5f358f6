"""Replaces smooth activations by piecewise-linear stand-ins, for targets that have ReLU and no others."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from asapc.passes.base import GraphPass, PassResult, PostconditionError

aten = torch.ops.aten
# Functions of one tensor, elementwise and smooth.
SMOOTH = {aten.gelu, aten.silu, aten.tanh, aten.sigmoid, aten.softplus, aten.mish, aten.exp}


def activation(node: Node) -> str | None:
    """Name the smooth function and the float type that a node computes; None for any other node."""
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in SMOOTH or len(node.all_input_nodes) != 1:
        return None
    if "val" not in node.meta:  # what a rewritten loop computes itself, as the exponential of its kernel
        return None
    options = [*map(str, node.args[1:]), *(f"{name} {value}" for name, value in sorted(node.kwargs.items()))]
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    return ", ".join([packet.__name__.removesuffix("_"), *options, dtype])


def function(node: Node) -> Callable[[Tensor], Tensor]:
    """Return the function that an activation node computes."""
    target, args, kwargs = node.target, node.args[1:], node.kwargs
    assert callable(target)
    return lambda x: target(x, *args, **kwargs)


class LowerActivations(GraphPass[GraphModule]):
    """Replaces activations by modules, in place.

    Args:
        modules: by `activation`; one without a module stays as it is.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules

    def call(self, program: GraphModule) -> PassResult[GraphModule]:
        """Replace the activations that have a module."""
        modified = False
        for node in list(program.graph.nodes):
            name = activation(node)
            if name is None or name not in self.modules:
                continue
            target = f"asapc_relu_{list(self.modules).index(name)}"
            if not hasattr(program, target):
                program.add_submodule(target, self.modules[name])
            with program.graph.inserting_before(node):
                replacement = program.graph.call_module(target, (node.all_input_nodes[0],))
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
            program.graph.erase_node(node)
            modified = True
        if modified:
            program.recompile()
        return PassResult(program, modified)

    def ensures(self, program: GraphModule) -> None:
        """Check that the graph is sound, and no activation with a module is left."""
        program.graph.lint()
        rest = {activation(node) for node in program.graph.nodes} & set(self.modules)
        if rest:
            raise PostconditionError(f"{', '.join(map(str, rest))} is still in the graph")
