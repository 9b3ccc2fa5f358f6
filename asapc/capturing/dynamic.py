"""Axes of the inputs that a compiled model leaves open, beside the batch: lengths of sequences, sides of images.

Sites are found, and operators fitted, in a graph whose lengths are those of the samples. Then the model is captured
again with open axes. Either it does the same operations in the same order, so that the sites are found again by their
place, or it branches on a length and cannot be compiled that way.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Graph, Node

from asapc.capturing.capture import capture_code
from asapc.errors import CaptureError, OptionError
from asapc.types.axes import FORM, parse_ranges
from asapc.types.graph import BATCH_AXIS, Axes, CapturedGraph, DynamicAxis
from asapc.types.model import LoadedModel
from asapc.types.options import EarlyStopRule
from asapc.types.samples import Samples
from asapc.types.site import Site


def parse_axes(text: str, samples: Samples) -> Axes:
    """Read axes, by the input's name and their number, from a description such as "batch=1:64,seq=16:2048".

    "batch" is the first axis of every input, "seq" the second of all that have one; others are named as "images.2".

    Raises:
        OptionError: not of that form, no such axis, or a range without the samples' own length.
    """
    axes: dict[str, dict[int, DynamicAxis]] = {name: {0: BATCH_AXIS} for name in samples.inputs}
    for name, low, high in parse_ranges(text):
        places = find_places(name, samples)
        sizes = {samples.inputs[of].shape[axis] for of, axis in places if axis > 0}
        if not places or len(sizes) > 1:
            why = f"has the lengths {', '.join(map(str, sorted(sizes)))}" if sizes else "is no axis of the inputs"
            raise OptionError(f"the dynamic axis {name[:80]} {why}", FORM)
        if not 1 <= low < high or not all(low <= size <= high and size > 1 for size in sizes):
            lengths = f"; the samples have {sizes.pop()}" if sizes else ""
            raise OptionError(f"the range {low}:{high} of the axis {name} cannot be{lengths}", FORM)
        for of, axis in places:
            axes[of][axis] = DynamicAxis(re.sub(r"\W", "_", name), low, high)
    return axes


def find_places(name: str, samples: Samples) -> list[tuple[str, int]]:
    """List the inputs and axes that a name stands for."""
    if name in ("batch", "seq"):
        axis = int(name == "seq")
        return [(of, axis) for of, value in samples.inputs.items() if value.dim() > axis]
    of, _, number = name.rpartition(".")
    exists = of in samples.inputs and number.isdigit() and 0 < int(number) < samples.inputs[of].dim()
    return [(of, int(number))] if exists else []


@dataclass(frozen=True)
class OpenAxis:
    """An open axis of the inputs: its least and largest length, and that of the samples."""

    low: int
    high: int
    own: int

    @property
    def other(self) -> int:
        """Another length: half the samples', or twice it where that is too short."""
        return max(self.low, self.own // 2) if self.own > self.low else min(self.high, 2 * self.own)

    @property
    def between(self) -> int:
        """A length between the least and the largest."""
        return (self.low + self.high) // 2


def open_axes(axes: Axes, samples: Samples) -> dict[str, OpenAxis]:
    """Return the open axes but the batch, by name."""
    return {
        axis.name: OpenAxis(axis.low, axis.high, samples.inputs[name].shape[number])
        for name, of_input in axes.items()
        for number, axis in of_input.items()
        if number > 0 and axis.high is not None
    }


def at_longest(site: Site, axes: Axes, samples: Samples) -> Site:
    """Resize a site to its longest axes: both sides, or the heads where they are open, grow by the largest factor."""
    longest = max((axis.high / axis.own for axis in open_axes(axes, samples).values()), default=1.0)
    loop = site.loop
    if loop.open_heads:
        return replace(site, loop=replace(loop, heads=round(loop.heads * longest)))
    loop = replace(loop, queries=round(loop.queries * longest), keys=round(loop.keys * longest))
    return replace(site, loop=loop)


def reopen(
    loaded: LoadedModel,
    samples: Samples,
    axes: Axes,
    graph: CapturedGraph,
    sites: Sequence[Site],
    early_stop: EarlyStopRule,
) -> tuple[CapturedGraph, list[Site]]:
    """Capture the model again with open axes, and locate the sites in that graph.

    Args:
        loaded: the model.
        samples: those that `graph` was captured with.
        axes: the open axes.
        graph: the model with the lengths of the samples.
        sites: the sites in `graph`.
        early_stop: as of `capture_code`.

    Raises:
        CaptureError: the model cannot be captured that way, or then does other operations.
    """
    uneven = next((site for site in sites if not site.loop.uniform), None)
    if uneven is not None:
        raise CaptureError(
            f"the marginals of {uneven.name} differ from token to token, for one length alone", "omit --dynamic"
        )
    open_graph = capture_code(loaded, samples, early_stop, axes)
    names = node_names(graph, open_graph)
    return open_graph, [replace(site, wiring=site.wiring.renamed(names)) for site in sites]


def node_names(graph: CapturedGraph, other: CapturedGraph) -> dict[str, str]:
    """Return what the nodes of a graph are called in another of the same model, captured at other lengths.

    Raises:
        CaptureError: the model does other operations there.
    """
    before, after = tensor_nodes(graph.program.graph), tensor_nodes(other.program.graph)
    if [kind(node) for node in before] != [kind(node) for node in after]:
        raise CaptureError(
            "with dynamic axes the model does other operations than without",
            "let the forward do the same for every length, and build its plans in full",
        )
    names = {old.name: new.name for old, new in zip(before, after, strict=True)}
    for node in graph.program.graph.nodes:
        if is_whole(node):
            names[node.name] = names[node.args[0].name]
    return names


def tensor_nodes(graph: Graph) -> list[Node]:
    """List the nodes of a graph that stand for tensors, in order, except slices of the whole."""
    return [node for node in graph.nodes if isinstance(node.meta.get("val"), Tensor) and not is_whole(node)]


def is_whole(node: Node) -> bool:
    """Return whether a node is a slice that omits nothing, as in `mask[:, None]`: graphs with open axes have none."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    arguments = dict(zip(("start", "end", "step"), node.args[2:], strict=False)) | node.kwargs
    whole = {"start": (None, 0), "end": (None, sys.maxsize), "step": (1,)}
    return all(value in whole[name] for name, value in arguments.items() if name in whole)


def kind(node: Node) -> tuple[str, str]:
    """Return what a node does, whatever its name and inputs."""
    return node.op, str(node.target)
