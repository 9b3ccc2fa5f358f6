"""Cuts long matrices down to some of their rows and columns, on which a loop is judged in their place.

A loop does the same to rows and columns however many there are: a graph whose nodes sum over whole axes, act on each
entry, or move axes about is the same loop on a part of the scores. Judged on all of them, one of 4,096 tokens takes
minutes and many GB in float64.
"""

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from asapc.ops.sinkhorn import Sinkhorn
from asapc.passes.find.candidates import PlanCandidate, propose, score_product
from asapc.passes.find.kinds import SIZE, SIZES_ONLY, is_elementwise, is_view, packet_of, view_source
from asapc.passes.find.probe import NotSinkhorn, require_precision
from asapc.passes.find.products import SHAPE, as_product
from asapc.passes.find.regions import descend
from asapc.passes.layout import arrange
from asapc.types.graph import CapturedGraph
from asapc.types.site import Site

aten = torch.ops.aten
LONG = 512  # longer axes of plans are cut
KEPT, ENDS = 256, 48  # entries that are kept of an axis, and how many of them at either end, where padding lies
# They sum over an axis, or take the largest on it, whatever its length; a mean divides by it.
OVER_AXES = {
    *(aten.sum, aten.logsumexp, aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.amax, aten.amin),
    *(aten.max, aten.min, aten.any, aten.all, aten.norm, aten.linalg_vector_norm),
}
PARTS = {aten.slice, aten.select, aten.narrow, aten.diagonal, aten.unfold, aten.split, aten.chunk, aten.unbind}


@dataclass(frozen=True, eq=False)
class Crop:
    """Which entries of long axes are kept.

    Attributes:
        places: the entries, by the length of the axis.
    """

    places: Mapping[int, Tensor]

    def value(self, node: Node, value: Any) -> Any:
        """Return what is kept of the value of a node."""
        if not isinstance(value, Tensor):
            return value
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int) and size in self.places:
                value = value.index_select(axis, self.places[size])
        return value

    def module(self, module: GraphModule) -> GraphModule:
        """Make a graph one of short axes, in place; it is there to be read and run in part, not as a whole."""
        for node in module.graph.nodes:
            node.meta.pop(SIZE, None)
            node.meta.pop(SHAPE, None)
            if isinstance(node.meta.get("val"), Tensor):
                node.meta["val"] = self.example(node.meta["val"])
            if is_view(node) or packet_of(node) in SIZES_ONLY:
                node.args = tuple(self.sizes(argument) for argument in node.args)
        return module

    def example(self, value: Tensor) -> Tensor:
        """Return an example value of the shape that is kept."""
        shape = [self.length(size) for size in value.shape]
        return value if shape == list(value.shape) else value.new_empty(shape)

    def sizes(self, argument: Any) -> Any:
        """Return an argument with the sizes in it, where it is a list, as they are kept."""
        return [self.length(size) for size in argument] if isinstance(argument, list | tuple) else argument

    def length(self, size: Any) -> Any:
        """Return how many entries of an axis are kept."""
        return len(self.places[size]) if isinstance(size, int) and size in self.places else size


@dataclass(frozen=True, eq=False)
class CutDown:
    """What of a graph is judged on short axes.

    Attributes:
        crop: what is kept of long ones.
        candidates: candidates by the name of their plan, read in a graph of short axes.
    """

    crop: Crop = field(default_factory=lambda: Crop({}))
    candidates: Mapping[str, PlanCandidate] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """The nodes of the graph of short axes whose values are needed, by name."""
        return {node.name: node for candidate in self.candidates.values() for node in candidate.evidence}

    @cached_property
    def ends(self) -> set[str]:
        """The names of the nodes where candidates begin, most probably, and end; see `confirm`."""
        return {node.name for c in self.candidates.values() for node in (*c.starts[:1], c.plan)}

    def values(self, node: Node, value: Any) -> dict[Node, Any]:
        """Return what is kept of a node's value in the whole graph, under that of the short one; or nothing."""
        return {self.nodes[node.name]: self.crop.value(node, value)} if node.name in self.nodes else {}

    def whole(self, site: Site) -> Site:
        """Return a site with the lengths that it has in the whole graph.

        Raises:
            WholeNeededError: its masses differ from row to row or from column to column.
        """
        if site.wiring.plan.node not in self.candidates:
            return site
        if not site.loop.uniform:
            raise WholeNeededError
        lengths = {len(entries): length for length, entries in self.crop.places.items()}
        queries, keys = (lengths.get(size, size) for size in (site.loop.queries, site.loop.keys))
        return replace(site, loop=replace(site.loop, queries=queries, keys=keys))


class WholeNeededError(Exception):
    """A part of the rows and columns does not show what a loop is."""


@contextmanager
def whole_where_it_fails() -> Iterator[None]:
    """Raise WholeNeededError for the errors of torch for shapes that do not fit."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        raise WholeNeededError from error


def cut_down(candidates: Sequence[PlanCandidate], graph: CapturedGraph) -> CutDown | None:
    """Cut down those candidates of a graph that can be judged on short axes; None where nothing is long."""
    cut = {candidate.plan.name: candidate for candidate in candidates if can_be_cut(candidate)}
    lengths = sorted({size for c in cut.values() for size in long_axes(c.plan.meta["val"].shape)})
    if not cut:
        return None
    # Axes of different lengths keep different lengths.
    crop = Crop({length: places(length, KEPT + number) for number, length in enumerate(lengths)})
    short = {c.plan.name: c for c in propose(crop.module(graph.program.module()).graph) if c.plan.name in cut}
    starts = {name: [start.name for start in candidate.starts] for name, candidate in cut.items()}
    agreeing = {
        name: replace(c, starts=tuple(start for start in c.starts if start.name in starts[name]), cut=True)
        for name, c in short.items()
    }
    return CutDown(crop, agreeing) if agreeing else None


def confirm(site: Site, values: Mapping[str, Tensor]) -> None:
    """Compare a loop with the whole plan of the first sample, head by head.

    Args:
        site: the site, with its own lengths.
        values: of the whole graph, by node.

    Raises:
        WholeNeededError: the plans differ.
    """
    loop, wiring = site.loop, site.wiring
    scores, plan = (
        arrange(values[operand.node], operand.axes, "nm", wiring.groups, loop.heads)[:1]
        for operand in (wiring.scores, wiring.plan)
    )
    masses = loop.row_mass, loop.column_mass
    # In float32: the tolerance is far above its rounding, and float64 takes a GB at 4,096 tokens.
    operator = Sinkhorn(loop.half_steps, loop.last, *masses, masked=loop.masked, wide=True).float()
    for head in range(loop.heads):
        of_head, expected = scores[:, head : head + 1].float(), plan[:, head : head + 1].float()
        exact = operator((of_head.log() if wiring.exponential else of_head) * loop.scale[head].float())
        try:
            require_precision(expected.exp() if wiring.logarithm else expected, exact)
        except NotSinkhorn as reason:
            raise WholeNeededError from reason


def can_be_cut(candidate: PlanCandidate) -> bool:
    """Return whether a candidate is long, and is judged on a part as on the whole."""
    lengths = set(long_axes(candidate.plan.meta["val"].shape))
    products = [product for node in candidate.region if (product := score_product(node)) is not None]
    # Of the axis that queries and keys are multiplied over, all is needed.
    inner = [
        product.left.meta["val"].shape[product.left_axes.index(a)] for product in products for a in product.contracted
    ]
    after = descend(candidate.starts, sorted(candidate.region))
    return bool(lengths) and not lengths & set(fixed(inner)) and all(acts_alike(node, lengths) for node in after)


def long_axes(shape: Sequence[Any]) -> list[int]:
    """Return the lengths of the axes that are to be cut; none where one is long alone, as of features."""
    lengths = [size for size in fixed(shape) if size > LONG]
    return lengths if len(lengths) > 1 else []


def fixed(sizes: Iterable[Any]) -> list[int]:
    """Return those sizes that are numbers; others follow the batch."""
    return [size for size in sizes if isinstance(size, int)]


def acts_alike(node: Node, lengths: Collection[int]) -> bool:
    """Return whether a node does the same on some entries of axes of these lengths as on all."""
    packet = packet_of(node)
    if is_elementwise(node) or packet in OVER_AXES | SIZES_ONLY or as_product(node) is not None:
        return True
    if not is_view(node):
        return node.target is operator.getitem
    source = view_source(node)
    if source is None or packet is aten.as_strided:
        return False
    of_source, of_node = ([size for size in fixed(n.meta["val"].shape) if size in lengths] for n in (source, node))
    # What takes a part may take it of other axes.
    return packet not in PARTS or of_source == of_node


def places(length: int, count: int) -> Tensor:
    """Return which entries of an axis are kept: all at its ends, others at equal distances."""
    between = torch.linspace(ENDS, length - ENDS - 1, count - 2 * ENDS).round().long()
    return torch.cat([torch.arange(ENDS), between, torch.arange(length - ENDS, length)])
