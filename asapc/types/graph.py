"""A model as one graph."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from asapc.types.samples import Samples


@dataclass(frozen=True, eq=False)
class EarlyStops:
    """The early stops that a captured model omits, and what that changes.

    Attributes:
        questions: the lines of code that ask whether to stop, by their "file:line".
        difference: of the captured outputs from the model's own on the calibration samples, relative to their norm.
        taken: whether that is more than rounding, so that the model does stop earlier.
    """

    questions: Mapping[str, str]
    difference: float
    taken: bool


@dataclass(frozen=True)
class DynamicAxis:
    """An open axis of an input, or of several.

    Attributes:
        name: those of one name have one length.
        low, high: its least and largest length; None for no limit.
    """

    name: str
    low: int
    high: int | None


Axes = Mapping[str, Mapping[int, DynamicAxis]]  # open axes, by the input's name and their number
BATCH_AXIS = DynamicAxis("batch", 1, None)
MAX_ENTRIES = 2**25  # of the largest value that a batch may have: 128 MB in float32


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """A model as one graph with a dynamic batch.

    Attributes:
        program: the exported program.
        example: the inputs it was captured with, batch at least 2.
        early_stops: the early stops that it omits; None where the model has none.
        axes: its open axes by the input's name and their number; None for the first of each, the batch, alone.
        departures: where values leave it as arrays, to be kept or printed, as "file:line"; they are no part of it.
        casts: where automatic casts begin that it omits, as "file:line".
        values: names of the values of the ONNX file that it was captured from, by the node that computes them. Some
            nodes compute none: they are steps inside a node of the file.
    """

    program: ExportedProgram
    example: Samples
    early_stops: EarlyStops | None = None
    axes: Axes | None = None
    departures: tuple[str, ...] = ()
    casts: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs: those that dicts, dataclasses and named tuples give them, else those of their nodes."""
        spec = self.program.call_spec.out_spec
        paths = [path for path, _ in tree_flatten_with_path(tree_unflatten(range(spec.num_leaves), spec))[0]]
        nodes: Any = self.program.graph.output_node().args[0]
        pairs = zip(paths, nodes, strict=True)
        names = {node: dotted(path) or node.name for path, node in pairs if isinstance(node, Node)}
        ambiguous = {*self.example.inputs, *(name for name, count in Counter(names.values()).items() if count > 1)}
        return [node.name if name in ambiguous else name for node, name in names.items()]

    @property
    def entries(self) -> int:
        """Entries of the largest value that the graph has for one sample: for long sequences, the scores."""
        values = (node.meta.get("val") for node in self.program.graph.nodes)
        sizes = (prod(map(hint, value.shape)) for value in values if isinstance(value, Tensor))
        return max(1, max(sizes, default=1) // len(self.example))

    def samples_at_once(self, most: int) -> int:
        """Return how many samples, at most so many, a batch may have so that its values stay below MAX_ENTRIES."""
        return max(1, min(most, MAX_ENTRIES // self.entries))


def dotted(path: Sequence[Any]) -> str | None:
    """Return a path of keys and attributes as one name, None where none of its parts has a name."""
    parts = [getattr(part, "key", getattr(part, "name", getattr(part, "idx", None))) for part in path]
    return ".".join(map(str, parts)) if any(isinstance(part, str) for part in parts) else None


def hint(size: Any) -> int:
    """Return a size, of an open axis that of the example."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def with_graph(
    program: ExportedProgram, module: GraphModule, kind: type[ExportedProgram] = ExportedProgram
) -> ExportedProgram:
    """Return a program with the same weights, inputs and outputs, and another graph in between."""
    signature = copy.deepcopy(program.graph_signature)
    # A copy of a graph renames nodes that have the name of a function of Python, as "input".
    for spec, node in zip(signature.input_specs, module.graph.find_nodes(op="placeholder"), strict=True):
        spec.arg.name = node.name
    outputs: Any = module.graph.output_node().args[0]
    for spec, value in zip(signature.output_specs, outputs, strict=True):
        if isinstance(value, Node):
            spec.arg.name = value.name
    return kind(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
