"""Names the outputs of a captured model as the user asks for."""

from collections.abc import Sequence
from typing import Any

from torch.fx import Node
from torch.utils._pytree import tree_structure

from asapc.errors import OptionError
from asapc.types.graph import CapturedGraph

OPTION = "--output-names"


def parse_names(text: str) -> tuple[str, ...]:
    """Parse `logits,attention`.

    Raises:
        OptionError: a name is empty, or stands there twice.
    """
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if len(set(names)) < len(names) or not all(names):
        raise OptionError(f"{OPTION} {text[:200]!r} has an empty name or one name twice", "give each output its own")
    return names


def rename_outputs(graph: CapturedGraph, names: Sequence[str]) -> None:
    """Have a graph return its outputs under names, in place.

    Args:
        graph: the graph.
        names: the new names, in the order of the outputs; none to leave them.

    Raises:
        OptionError: there are more or fewer names than outputs, or an input has one of them.
    """
    if not names:
        return
    if len(names) != len(graph.output_names):
        outputs = ", ".join(graph.output_names)
        raise OptionError(
            f"{OPTION} gives {len(names)} names, and the model has {len(graph.output_names)} outputs: {outputs}",
            "give one name for each output, in this order",
        )
    if of_inputs := [name for name in names if name in graph.example.inputs]:
        raise OptionError(f"{OPTION} gives an output the name of an input: {', '.join(of_inputs)}", "choose another")
    signature = graph.program.module_call_graph[0].signature
    assert signature is not None  # the first is that of the whole program
    following = iter(names)
    nodes: Any = graph.program.graph.output_node().args[0]
    keys = [next(following) if isinstance(node, Node) else f"none {number}" for number, node in enumerate(nodes)]
    signature.out_spec = tree_structure(dict.fromkeys(keys, 0))
