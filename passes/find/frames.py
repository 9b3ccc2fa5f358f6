"""Tells which axes of a plan are its rows, its columns, its heads and its samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from asapc.passes.find.candidates import Candidate, Use, carried_axes, carry, example_shape
from asapc.passes.find.kinds import is_view, makes_scores
from asapc.passes.find.products import Product, as_product
from asapc.passes.layout import arrange, positions, restore


@dataclass(frozen=True)
class Frame:
    """The layout that scores and plan have in the graph; letters as in `types.site.Operand`."""

    axes: str
    groups: int
    heads: int

    def arrange(self, tensor: Tensor) -> Tensor:
        """The tensor as (B, H, N, M)."""
        return arrange(tensor, self.axes, "nm", self.groups, self.heads)

    def restore(self, tensor: Tensor) -> Tensor:
        """A tensor (B, H, N, M) in the graph's layout."""
        return restore(tensor, self.axes, "nm", self.groups, self.heads)


def frames(candidate: Candidate, shape: Sequence[int], batch: int) -> Iterator[Frame]:
    """Layouts that a plan of this shape may have, the usual one, matrices at the end, first."""
    sizes = candidate.plan.meta["val"].shape
    static = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size > 1]
    dynamic = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    if len(dynamic) != 1:
        return
    per_sample = shape[dynamic[0]] // batch
    for rows, columns in sorted(combinations(static, 2), reverse=True):
        heads = [axis for axis in static if axis not in (rows, columns)]
        if len(heads) > 2:
            continue
        letters = ["1"] * len(sizes)
        for axis, letter in zip((rows, columns, *heads), "nm" + ("gh" if len(heads) == 2 else "h"), strict=False):
            letters[axis] = letter
        number = [shape[axis] for axis in heads]
        letters[dynamic[0]] = "b"
        if per_sample > 1 and not heads:
            letters[dynamic[0]] = merged_order(candidate)
            number = [per_sample]
        axes = "".join(letters)
        placed = [found for use in candidate.uses if (found := place(use, axes)) is not None]
        if placed and "n" in placed[0].contracted:  # multiplied with values from the other side
            axes = axes.translate(str.maketrans("nm", "mn"))
        yield Frame(axes, number[0] if len(number) == 2 else 1, int(torch.Size(number).numel()))


@dataclass(frozen=True)
class Placed:
    """How a plan stands in the product that uses it.

    Attributes:
        product: the product.
        side: which of its operands carries the plan, "left" or "right".
        names: letters as in `types.site.Operand` by those of the product.
        contracted: letters of the axes that it sums over.
    """

    product: Product
    side: str
    names: Mapping[str, str]
    contracted: str


def place(use: Use, axes: str) -> Placed | None:
    """Find a plan with these axes in the product that uses it; None if that is none, or does not hold whole axes."""
    product = as_product(use.user)
    letters = None if product is None else carried_axes(use.path, axes)
    if product is None or letters is None:
        return None
    side = "left" if product.left is use.path[-1] else "right"
    names = dict(zip(product.left_axes if side == "left" else product.right_axes, letters, strict=True))
    return Placed(product, side, names, "".join(names[letter] for letter in product.contracted))


def merged_order(candidate: Candidate) -> str:
    """Letter of an axis that holds samples and heads: "y" where neighbours on it are samples, else "z".

    Told by following the product's first operand back to where the samples had an axis of their own.
    """
    products = [product for n in sorted(candidate.region) if makes_scores(n) and (product := as_product(n))]
    path = [products[0].left] if products else []
    while path and is_view(path[0]) and path[0].all_input_nodes:
        source = path[0].all_input_nodes[0]
        if not isinstance(source.meta.get("val"), Tensor):
            break
        path.insert(0, source)
    for begin in range(len(path) - 1):
        seen = carry(path[begin:])
        if seen is not None and seen.shape[0] > 1:
            shape = example_shape(path[begin])
            stride = positions(shape).stride()[0]
            return "y" if int(seen[(1, *[0] * (seen.dim() - 1))]) == stride * int(seen.shape[0] > shape[0]) else "z"
    return "z"
