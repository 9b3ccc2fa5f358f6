"""Finds products that apply a plan which the graph does not hold: a * (K @ (b * v)).

What scales values or result without varying along the values' own axis is one number for all that an entry of
the matrix meets, so it may as well scale the matrix. Only what is made of the matrix, or of what the matrix is made
of, counts: the scaling vectors of a loop are, a gate on the values is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations, permutations
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from asapc.passes.find.candidates import carried_axes, carry, example_shape, paths_to
from asapc.passes.find.kinds import depends_on, makes_scores, size_of, viewed_by
from asapc.passes.find.products import Product, as_product, shape_of
from asapc.passes.layout import MERGED, follow_axes, invert

aten = torch.ops.aten


@dataclass(frozen=True)
class Scaling:
    """What scales a product, and can scale the matrix in it.

    Attributes:
        factor: what is multiplied with, or divided by.
        divides: whether it is divided by.
        axes: letters of the factor's axes.
        target: letters of the matrix's axes, "1" where the factor does not vary; as `layout.align` takes them.
    """

    factor: Node
    divides: bool
    axes: str
    target: str


@dataclass(frozen=True)
class Unbuilt:
    """A product that applies a plan which the graph does not hold.

    Attributes:
        product: the product.
        scalings: what makes a plan of the matrix.
        matrix: the matrix, and views of it up to the operand of the product.
        values: the values, and what becomes of them up to the operand of the product.
        left_out: multiplications and divisions among the steps that move onto the matrix, and what they scale.
        result: what becomes of the product, up to the last of those.
        equation: what is left of an einsum that scales on its own; None where the product stays as it is.
    """

    product: Node
    scalings: tuple[Scaling, ...]
    matrix: tuple[Node, ...]
    values: tuple[Node, ...]
    left_out: Mapping[Node, Node] = field(default_factory=dict)
    result: tuple[Node, ...] = ()
    equation: str | None = None


def find_unbuilt(node: Node) -> Unbuilt | None:
    """What is to be built for a node; None where it is no product, or has no scaling that can be moved."""
    product = as_product(node)
    if (
        product is None
        or node.target is aten.baddbmm.default
        or not makes_scores(node)
        or product.left is product.right
    ):
        return None
    left, right = (product.left, product.left_axes), (product.right, product.right_axes)
    found = [unbuilt for sides in ((left, right), (right, left)) if (unbuilt := scaled_matrix(product, *sides))]
    return max(found, key=lambda unbuilt: len(unbuilt.scalings), default=None)


def scaled_matrix(product: Product, operand: tuple[Node, str], others: tuple[Node, str]) -> Unbuilt | None:
    """The same, with one operand of the product, given with its letters, for the matrix and the other for values."""
    views, axes = unturned(*operand)
    values, result = way_up(others[0]), way_down(product.node)
    scalings: dict[Node, Scaling] = {}

    def move(node: Node, seen: Tensor | None, letters: str) -> None:
        scaling = None if seen is None else as_scaling(node, seen, letters, axes)
        if scaling is not None and is_made_of(scaling.factor, views[0]) and type_of(node) == type_of(operand[0]):
            scalings[node] = scaling

    for i, node in enumerate(values):
        if reading(node) is not None:
            move(node, carry(values[i:]), others[1])
    for i, node in enumerate(result):
        if reading(node) is not None and (seen := carry(result[: i + 1])) is not None:
            move(node, invert(seen, example_shape(product.node)), product.out_axes)
    if not scalings:
        return None
    while len(values) > 1 and values[1] not in scalings:
        del values[0]
    while len(result) > 1 and result[-1] not in scalings:
        del result[-1]
    left_out = {node: read[0] for node in scalings if (read := reading(node)) is not None}
    return Unbuilt(product.node, tuple(scalings.values()), tuple(views), tuple(values), left_out, tuple(result[1:]))


def find_unbuilt_equation(node: Node) -> Unbuilt | None:
    """What is to be built for an einsum of kernel, vectors and values at once; None for any other node."""
    equation, terms = node.args[:2] if node.target is aten.einsum.default else (None, ())
    if not isinstance(equation, str) or not isinstance(terms, list | tuple) or len(terms) < 3:
        return None
    letters = "".join(sorted(set(equation) - set(",->. ")))
    # Letters of one's own, since "y" and "z" stand for merged axes elsewhere.
    renamed = equation.replace(" ", "").translate(str.maketrans(letters, ascii_letters[: len(letters)]))
    inputs, _, out = renamed.partition("->")
    axes = inputs.split(",")
    if "." in renamed or set(renamed) & set(MERGED) or any(len(set(each)) < len(each) for each in axes):
        return None
    operands = [term for term in terms if isinstance(term, Node)]
    for (m, matrix), (v, values) in permutations(zip(axes, operands, strict=True), 2):
        kept, summed = set(out), (set(m) & set(v)) - set(out)
        others = [(a, factor) for a, factor in zip(axes, operands, strict=True) if factor not in (matrix, values)]
        if not (summed and (set(m) - set(v)) & kept and (set(v) - set(m)) & kept) or len(others) != len(axes) - 2:
            continue
        if all(set(a) <= set(m) and is_made_of(factor, matrix) for a, factor in others):
            scalings = (Scaling(f, False, a, "".join(each if each in a else "1" for each in m)) for a, f in others)
            return Unbuilt(node, tuple(scalings), (matrix,), (values,), equation=f"{m},{v}->{out}")
    return None


def is_made_of(factor: Node, matrix: Node) -> bool:
    """Whether a factor depends on a matrix, or on what that is made of entry by entry, and is of its type."""
    return type_of(factor) == type_of(matrix) and any(depends_on(factor, path[0]) for path in paths_to(matrix))


def as_scaling(node: Node, seen: Tensor, letters: str, matrix_axes: str) -> Scaling | None:
    """A node as a scaling of the matrix; None where it is none, or varies along an axis that the matrix lacks.

    Args:
        node: the node.
        seen: positions in it, as the operand or the result of the product has them.
        letters: of that operand or result, in the product.
        matrix_axes: letters of the matrix, in the product.
    """
    _, factor = reading(node) or (None, None)
    if not isinstance(factor, Node) or (sizes := shape_of(factor)) is None:
        return None
    shape = example_shape(node)
    for first, second in combinations(range(len(shape)), 2):  # views may have merged two of the node's axes
        rest = iter("ijklpqrs")
        names = "".join({first: "b", second: "h"}.get(axis) or next(rest) for axis in range(len(shape)))
        if (found := follow_axes(seen, names, shape)) is None:
            continue
        place = dict(zip(letters, found, strict=True))
        axes = "".join("1" if s == "1" else n for s, n in zip(sizes, names[len(names) - len(sizes) :], strict=True))
        target = [place.get(letter, "1") for letter in matrix_axes]
        target = [letter if set(MERGED.get(letter, letter)) <= set(axes) else "1" for letter in target]
        reached = {part for letter in target for part in MERGED.get(letter, letter)}
        if not set(axes) <= reached | {"1"}:
            return None
        return Scaling(factor, node.target is aten.div.Tensor, axes, "".join(target))
    return None


def reading(node: Node) -> tuple[Node, Any] | None:
    """A multiplication or division as the operand that is as large as the result, and the one that is smaller."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    left, right = node.args[:2]
    for through, factor in [(left, right)] + [(right, left)] * (node.target is aten.mul.Tensor):
        while isinstance(factor, Node) and factor.target is aten.expand.default:
            factor = factor.args[0]
        smaller = not isinstance(factor, Node) or shape_of(factor) != shape_of(node)
        if isinstance(through, Node) and shape_of(through) == shape_of(node) and smaller:
            return through, factor
    return None


def carrier(node: Node) -> Node | None:
    """The input of a view that keeps everything, or what is scaled by a scaling; None for any other node."""
    if (read := reading(node)) is not None:
        return read[0]
    viewed = viewed_by(node)
    return viewed if viewed is not None and size_of(viewed) == size_of(node) else None


def way_up(operand: Node) -> list[Node]:
    """Views and scalings that lead to an operand, the operand last, and before all what they begin with."""
    path = [operand]
    while (before := carrier(path[0])) is not None:
        path.insert(0, before)
    return path


def way_down(product: Node) -> list[Node]:
    """A product, and views and scalings that follow it, as long as nothing else reads what is scaled."""
    path = [product]
    while len(path[-1].users) == 1 and carrier(user := next(iter(path[-1].users))) is path[-1]:
        path.append(user)
    return path


def unturned(operand: Node, axes: str) -> tuple[list[Node], str]:
    """The way to a matrix from where its axes were not yet exchanged, where its loop is, and its letters there."""
    path = [operand]
    while (viewed := viewed_by(path[0])) is not None:
        names = "ijklpqrs"[: len(example_shape(viewed))]
        letters = carried_axes([viewed, path[0]], names)
        if letters is None or sorted(letters) != sorted(names) or type_of(viewed) != type_of(operand):
            break
        path.insert(0, viewed)
        axes = "".join(axes[letters.index(name)] for name in names)
    return path, axes


def type_of(node: Node) -> torch.dtype:
    """Type of a tensor's entries."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
