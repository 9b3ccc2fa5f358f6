"""Runs a part of a graph as a function, in float64, on any values."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten


class OpenRegionError(Exception):
    """The end of a region depends on more than its start, or not on it at all."""


class Region:
    """The part of a graph from one node to another, as a function in float64.

    Args:
        start: where it begins.
        end: where it ends.
        within: nodes that may take part.
        values: of nodes outside, as the graph computed them.
        exponential: whether the start holds exp(scores).
    """

    def __init__(
        self,
        start: Node,
        end: Node,
        within: Collection[Node],
        values: Mapping[Node, Any],
        exponential: bool = False,
    ) -> None:
        self.start, self.end, self.exponential = start, end, exponential
        below = descend({start}, [node for node in sorted(within) if start < node])
        nodes = ancestors(end, below)  # between start and end
        inputs = {n for node in nodes for n in node.all_input_nodes} - nodes - {start}
        self.nodes = sorted(nodes)
        self.closed = end in nodes and inputs <= values.keys()
        self.inputs = {n: double(values[n]) for n in inputs if n in values}

    def __call__(
        self,
        value: Tensor,
        arguments: Mapping[Node, tuple[Any, ...]] | None = None,
        inputs: Mapping[Node, Any] | None = None,
    ) -> Tensor:
        """Compute the value of the end from another value of the start.

        Args:
            value: of the start.
            arguments: positional arguments that replace those of some nodes.
            inputs: values that replace those of some inputs.

        Raises:
            OpenRegionError: the end does not depend on the start alone.
        """
        if not self.closed:
            raise OpenRegionError
        arguments = arguments or {}
        env: dict[Node, Any] = {**self.inputs, **(inputs or {}), self.start: value}
        for node in self.nodes:
            args, kwargs = map_arg((arguments.get(node, node.args), node.kwargs), env.__getitem__)
            # A cast to another floating type would round what has to stay exact, so it is skipped. A view was
            # traced for contiguous tensors; these may be transposed, which takes a reshape.
            operator: Any = torch.reshape if node.target is aten.view.default else node.target
            env[node] = args[0] if is_cast(node) else operator(*args, **kwargs)
        result: Tensor = env[self.end]
        return result.double()


def descend(sources: Collection[Node], ordered: Collection[Node]) -> set[Node]:
    """Return those nodes that depend on a source; the nodes are in the order of the graph."""
    below: set[Node] = set()
    for node in ordered:
        if any(n in below or n in sources for n in node.all_input_nodes):
            below.add(node)
    return below


def ancestors(end: Node, within: Collection[Node]) -> set[Node]:
    """Return a node and what it depends on through nodes of a set alone."""
    nodes: set[Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in within and node not in nodes:
            nodes.add(node)
            stack += node.all_input_nodes
    return nodes


def is_cast(node: Node) -> bool:
    """Return whether a node changes nothing but the floating type."""
    source, value = node.args[0] if node.args else None, node.meta.get("val")
    return (
        node.target in (aten._to_copy.default, aten.to.dtype)
        and isinstance(source, Node)
        and source.meta["val"].is_floating_point()
        and isinstance(value, Tensor)
        and value.is_floating_point()
    )


def double(value: Any) -> Any:
    """Return floating tensors in float64, everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
