"""Works out which axes of a plan are its rows, its columns, its heads and its samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor
from torch.fx import Node

from asapc.passes.find.candidates import PlanCandidate, Use, carried_axes, carry, example_shape, score_product
from asapc.passes.find.kinds import is_view
from asapc.passes.find.products import Product, as_product
from asapc.passes.layout import arrange, positions, restore


@dataclass(frozen=True)
class Frame:
    """The layout that scores and plan have in the graph; letters as in `types.site.Operand`."""

    axes: str
    groups: int
    heads: int

    def arrange(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (B, H, N, M)."""
        return arrange(tensor, self.axes, "nm", self.groups, self.heads)

    def restore(self, tensor: Tensor) -> Tensor:
        """Return a tensor (B, H, N, M) in the graph's layout."""
        return restore(tensor, self.axes, "nm", self.groups, self.heads)


def frames(candidate: PlanCandidate, shape: Sequence[int], batch: int) -> Iterator[Frame]:
    """Yield the layouts that a plan of this shape may have; the usual one, with the matrices last, comes first."""
    sizes = candidate.plan.meta["val"].shape
    static = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size > 1]
    dynamic = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    if len(dynamic) != 1:  # samples have one axis, alone or merged with heads
        return
    for rows, columns in sorted(combinations(static, 2), reverse=True):
        heads = [axis for axis in static if axis not in (rows, columns)]
        if len(heads) <= 2:
            letters = dict(zip((*heads, rows, columns), "gh"[2 - len(heads) :] + "nm", strict=True))
            yield frame(candidate, letters | {dynamic[0]: "b"}, shape, batch)


def frame(candidate: PlanCandidate, letters: Mapping[int, str], shape: Sequence[int], batch: int) -> Frame:
    """Return the layout of a plan, as far as its shape and its use determine it.

    Args:
        candidate: the plan and its uses.
        letters: of its axes by axis; those without one have length 1.
        shape: of the plan on the samples.
        batch: number of samples.
    """
    axes = "".join(letters.get(axis, "1") for axis in range(len(shape)))
    sizes = {letter: shape[axis] for axis, letter in letters.items()}
    groups, heads = sizes.get("g", 1), sizes.get("h", 1)
    per_sample = sizes["b"] // batch
    if per_sample > 1 and "h" not in sizes:  # samples and heads have one axis
        axes, heads = axes.replace("b", merged_order(candidate)), per_sample
    applied = next(filter(None, (place(use, axes) for use in candidate.uses)), None)
    if applied is not None and "n" in applied.contracted:  # the values are multiplied from the other side
        axes = axes.translate(str.maketrans("nm", "mn"))
    return Frame(axes, groups, groups * heads)


@dataclass(frozen=True)
class Placement:
    """How a plan appears in the product that uses it.

    Attributes:
        product: the product.
        side: which of its operands carries the plan, "left" or "right".
        names: letters as in `types.site.Operand`, by those of the product.
        contracted: letters of the axes that it sums over.
    """

    product: Product
    side: str
    names: Mapping[str, str]
    contracted: str


def place(use: Use, axes: str) -> Placement | None:
    """Find a plan with these axes in the product that uses it; None if it is no product or loses the axes."""
    product = as_product(use.user)
    letters = None if product is None else carried_axes(use.path, axes)
    if product is None or letters is None:
        return None
    side = "left" if product.left is use.path[-1] else "right"
    names = dict(zip(product.left_axes if side == "left" else product.right_axes, letters, strict=True))
    return Placement(product, side, names, "".join(names[letter] for letter in product.contracted))


def merged_order(candidate: PlanCandidate) -> str:
    """Return the letter of an axis that merges samples and heads: "y" where neighbours on it are samples, else "z".

    Follows the product's first operand back to where the samples have an axis of their own.
    """
    products = (product for n in sorted(candidate.region) if (product := score_product(n)) is not None)
    product = next(products, None)
    path = [] if product is None else views_up(product.left)
    for begin in range(len(path) - 1):
        places = carry(path[begin:])
        if places is not None and places.shape[0] > 1:
            shape = example_shape(path[begin])
            # Samples come first in the source: a step along the merged axis leads to the next sample, or to a head.
            step = int(places[(1, *[0] * (places.dim() - 1))])
            sample = positions(shape).stride()[0] * int(places.shape[0] > shape[0])
            return "y" if step == sample else "z"
    return "z"


def views_up(operand: Node) -> list[Node]:
    """Return the path of views to an operand: the tensor that they view first, the operand last."""
    path = [operand]
    while is_view(path[0]) and path[0].all_input_nodes:
        source = path[0].all_input_nodes[0]
        if not isinstance(source.meta.get("val"), Tensor):
            break
        path.insert(0, source)
    return path
