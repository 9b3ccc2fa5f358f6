"""Finds products that apply a plan which the graph does not hold: a * (K @ (b * v)).

A factor of the values or of the result that does not vary along the values' own axis can scale the matrix instead.
It counts only if it depends on the matrix, or on what the matrix is computed from entry by entry: the scaling vectors
of a loop do, a gate on the values does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from asapc.passes.find.candidates import carried_axes, carry, example_shape, paths_to
from asapc.passes.find.kinds import depends_on, makes_scores, size_of, view_source
from asapc.passes.find.products import Product, as_product, shape_of, split_equation
from asapc.passes.layout import MERGED, follow_axes, invert

aten = torch.ops.aten


@dataclass(frozen=True)
class Scaling:
    """A scaling of a product that can scale the matrix in it.

    Attributes:
        factor: what multiplies or divides.
        divides: whether it divides.
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
        scalings: what turns the matrix into the plan.
        matrix: the matrix, and views of it up to the operand of the product.
        values: the path from the values to the operand of the product.
        bypass: the scalings on the paths, which move onto the matrix, and what they scale.
        result: the path from the product to the last scaling.
        equation: what is left of an einsum that scales on its own; None where the product stays as it is.
    """

    product: Node
    scalings: tuple[Scaling, ...]
    matrix: tuple[Node, ...]
    values: tuple[Node, ...]
    bypass: Mapping[Node, Node] = field(default_factory=dict)
    result: tuple[Node, ...] = ()
    equation: str | None = None


@dataclass(frozen=True)
class ProductOperand:
    """An operand of a product, and the letters of its axes."""

    node: Node
    axes: str


def find_unbuilt(node: Node) -> Unbuilt | None:
    """Read a node as a product with scalings; None where it is no product, or has no scaling that can move."""
    product = None if node.target is aten.baddbmm.default or not makes_scores(node) else as_product(node)
    if product is None or product.left is product.right:
        return None
    left, right = ProductOperand(product.left, product.left_axes), ProductOperand(product.right, product.right_axes)
    both = [scaled_matrix(product, left, right), scaled_matrix(product, right, left)]
    return max(filter(None, both), key=lambda unbuilt: len(unbuilt.scalings), default=None)


def scaled_matrix(product: Product, matrix: ProductOperand, values: ProductOperand) -> Unbuilt | None:
    """Read a product with one operand for the matrix and the other for the values; None where no scaling can move."""
    views, axes = undo_transposes(matrix.node, matrix.axes)
    way, result = path_up(values.node), path_down(product.node)
    scalings: dict[Node, Scaling] = {}
    for step in [*steps_up(way, values.axes), *steps_down(result, product.out_axes)]:
        scaling = as_scaling(step, axes)
        if scaling is not None and derives_from(step.factor, views[0]) and type_of(step.node) == type_of(matrix.node):
            scalings[step.node] = scaling
    if not scalings:
        return None
    # Steps before the first scaling of the values and after the last of the result stay as they are.
    begin = next((i for i in range(len(way) - 1) if way[i + 1] in scalings), len(way) - 1)
    end = max((i for i, node in enumerate(result) if node in scalings), default=0)
    return Unbuilt(
        product=product.node,
        scalings=tuple(scalings.values()),
        matrix=tuple(views),
        values=tuple(way[begin:]),
        bypass={node: through for node in scalings if (through := carrier(node)) is not None},
        result=tuple(result[1 : end + 1]),
    )


@dataclass(frozen=True, eq=False)
class Step:
    """A multiplication or division on the path to a product or from it.

    Attributes:
        node: the node.
        factor: the tensor that multiplies or divides.
        places: positions in the node, as the operand or the result of the product has them.
        letters: of that operand or result, in the product.
    """

    node: Node
    factor: Node
    places: Tensor
    letters: str


def steps_up(way: Sequence[Node], letters: str) -> Iterator[Step]:
    """Yield the scalings of an operand on the path to its product."""
    for i, node in enumerate(way):
        factor = factor_of(node)
        if factor is not None and (places := carry(way[i:])) is not None:
            yield Step(node, factor, places, letters)


def steps_down(result: Sequence[Node], letters: str) -> Iterator[Step]:
    """Yield the scalings of a product, the first node, on the path from it."""
    for i, node in enumerate(result):
        factor = factor_of(node)
        if factor is not None and (places := carry(result[: i + 1])) is not None:
            back = invert(places, example_shape(result[0]))
            if back is not None:
                yield Step(node, factor, back, letters)


def find_unbuilt_equation(node: Node) -> Unbuilt | None:
    """Read a node as one einsum of kernel, vectors and values; None for any other node."""
    equation = read_equation(node)
    if equation is None:
        return None
    terms, out = equation
    for matrix, values in permutations(terms, 2):
        factors = [term for term in terms if term.node not in (matrix.node, values.node)]
        if len(factors) < len(terms) - 2 or not applies(matrix, values, out):
            continue
        if all(set(term.axes) <= set(matrix.axes) and derives_from(term.node, matrix.node) for term in factors):
            scalings = tuple(equation_scaling(term, matrix) for term in factors)
            rest = f"{matrix.axes},{values.axes}->{out}"
            return Unbuilt(node, scalings, (matrix.node,), (values.node,), equation=rest)
    return None


def read_equation(node: Node) -> tuple[list[ProductOperand], str] | None:
    """Return the terms and the result's letters of an einsum of three tensors or more; None for any other node."""
    equation, nodes = node.args[:2] if node.target is aten.einsum.default else (None, ())
    if not isinstance(equation, str) or not isinstance(nodes, list | tuple) or len(nodes) < 3:
        return None
    # Letters are renamed, since "y" and "z" stand for merged axes elsewhere.
    letters = "".join(sorted(set(equation) - set(",->. ")))
    renamed = equation.translate(str.maketrans(letters, ascii_letters[: len(letters)]))
    axes = split_equation(renamed)
    if axes is None or "->" not in renamed or set(renamed) & set(MERGED):
        return None
    operands = [operand for operand in nodes if isinstance(operand, Node)]
    return [ProductOperand(*pair) for pair in zip(operands, axes[0], strict=True)], axes[1]


def applies(matrix: ProductOperand, values: ProductOperand, out: str) -> bool:
    """Return whether an einsum sums over an axis of two terms, and keeps an axis of each that the other lacks."""
    rows, columns, result = set(matrix.axes), set(values.axes), set(out)
    return bool((rows & columns) - result and (rows - columns) & result and (columns - rows) & result)


def equation_scaling(factor: ProductOperand, matrix: ProductOperand) -> Scaling:
    """Read a term of an einsum as a scaling of another that has all its axes."""
    target = "".join(axis if axis in factor.axes else "1" for axis in matrix.axes)
    return Scaling(factor.node, False, factor.axes, target)


def derives_from(factor: Node, matrix: Node) -> bool:
    """Return whether a factor has a matrix's type, and depends on it or on what it is computed from entry by entry."""
    return type_of(factor) == type_of(matrix) and any(depends_on(factor, path[0]) for path in paths_to(matrix))


def as_scaling(step: Step, matrix_axes: str) -> Scaling | None:
    """Read a step as a scaling of the matrix; None where it varies along an axis that the matrix lacks.

    Args:
        step: the step.
        matrix_axes: letters of the matrix, in the product.
    """
    sizes = shape_of(step.factor)
    names, letters = name_axes(step)
    if sizes is None or not names:
        return None
    axes = "".join("1" if s == "1" else n for s, n in zip(sizes, names[len(names) - len(sizes) :], strict=True))
    place = dict(zip(step.letters, letters, strict=True))
    target = [place.get(letter, "1") for letter in matrix_axes]
    target = [letter if parts(letter) <= set(axes) else "1" for letter in target]
    if not set(axes) <= {"1"}.union(*map(parts, target)):
        return None
    return Scaling(step.factor, step.node.target is aten.div.Tensor, axes, "".join(target))


def name_axes(step: Step) -> tuple[str, str]:
    """Name the axes of a step; return the names there and in the operand or result, empty where they are lost."""
    shape = example_shape(step.node)
    for merged in combinations(range(len(shape)), 2):  # views may have merged any two axes of the node
        names = list("ijklpqrs"[: len(shape) - 2])
        for axis, letter in zip(merged, "bh", strict=True):
            names.insert(axis, letter)
        letters = follow_axes(step.places, "".join(names), shape)
        if letters is not None:
            return "".join(names), letters
    return "", ""


def parts(letter: str) -> set[str]:
    """Return the letters of the axes that a letter merges, or the letter itself."""
    return set(MERGED.get(letter, letter))


def read_scaling(node: Node) -> tuple[Node, Any] | None:
    """Split a multiplication or division into the operand of the result's shape and the smaller one; else None."""
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


def factor_of(node: Node) -> Node | None:
    """Return the tensor that a node scales by; None where it does not scale, or scales by a number."""
    _, factor = read_scaling(node) or (None, None)
    return factor if isinstance(factor, Node) else None


def carrier(node: Node) -> Node | None:
    """Return the input of a view that keeps all entries, or of a scaling; None for any other node."""
    if (scaling := read_scaling(node)) is not None:
        return scaling[0]
    source = view_source(node)
    return source if source is not None and size_of(source) == size_of(node) else None


def path_up(operand: Node) -> list[Node]:
    """Return the path of views and scalings to an operand: what they begin with first, the operand last."""
    path = [operand]
    while (before := carrier(path[0])) is not None:
        path.insert(0, before)
    return path


def path_down(product: Node) -> list[Node]:
    """Return a product, and the views and scalings that follow it as the only readers."""
    path = [product]
    while len(path[-1].users) == 1 and carrier(user := next(iter(path[-1].users))) is path[-1]:
        path.append(user)
    return path


def undo_transposes(operand: Node, axes: str) -> tuple[list[Node], str]:
    """Return the path to a matrix from before its axes were transposed, where its loop is, and its letters there."""
    path = [operand]
    while (source := view_source(path[0])) is not None:
        names = "ijklpqrs"[: len(example_shape(source))]
        letters = carried_axes([source, path[0]], names)
        if letters is None or sorted(letters) != sorted(names) or type_of(source) != type_of(operand):
            break
        path.insert(0, source)
        axes = "".join(axes[letters.index(name)] for name in names)
    return path, axes


def type_of(node: Node) -> torch.dtype:
    """Return the type of a tensor's entries."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
