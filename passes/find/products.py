"""Products of two tensors in a graph, whichever operator they are written with, as one equation over axes."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_lowercase

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
SHAPE = "asapc_shape"  # metadata: a cache of `shape_of`


@dataclass(frozen=True)
class Product:
    """A sum of products: out[out_axes] = sum of left[left_axes] * right[right_axes].

    The letters are the equation's own and only say which axes are the same; "1" is an axis that broadcasts.
    """

    node: Node
    left: Node
    right: Node
    left_axes: str
    right_axes: str
    out_axes: str

    @property
    def contracted(self) -> str:
        """Letters that are summed over."""
        return "".join(a for a in self.left_axes if a in self.right_axes and a not in self.out_axes + "1")

    def only(self, side: str) -> str:
        """Return the letters of one operand, "left" or "right", that the other lacks and the result has."""
        mine, others = (self.left_axes, self.right_axes) if side == "left" else (self.right_axes, self.left_axes)
        return "".join(a for a in mine if a in self.out_axes and a not in others)


def as_product(node: Node) -> Product | None:
    """Return the product that a node computes; None if it is no product of two tensors, or not of a form read here."""
    if node.target in (aten.matmul.default, aten.bmm.default):
        left, right = node.args[:2]
    elif node.target is aten.baddbmm.default:  # adds a term; the scores hold its product all the same
        left, right = node.args[1:3]
    elif node.target is aten.einsum.default:
        return from_equation(node)
    else:
        return None
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return from_matrices(node, left, right)


def from_matrices(node: Node, left: Node, right: Node) -> Product | None:
    """Read a matrix product over the last axes, whose leading axes broadcast; None if an operand is no matrix."""
    left_shape, right_shape = shape_of(left) or (), shape_of(right) or ()
    if min(len(left_shape), len(right_shape)) < 2:
        return None
    rank = max(len(left_shape), len(right_shape))
    lead, (row, inner, column) = ascii_lowercase[: rank - 2], "XYZ"

    def lead_axes(shape: tuple[str, ...]) -> str:
        letters = lead[rank - len(shape) :]
        # Where both operands have length 1 the letter is of no consequence.
        return "".join("1" if size == "1" else letter for size, letter in zip(shape[:-2], letters, strict=True))

    left_axes, right_axes = lead_axes(left_shape) + row + inner, lead_axes(right_shape) + inner + column
    out = "".join(letter if letter in left_axes + right_axes else "1" for letter in lead) + row + column
    return Product(node, left, right, left_axes, right_axes, out)


def from_equation(node: Node) -> Product | None:
    """Read an einsum of two operands without ellipsis and without repeated axes; None for any other."""
    equation, nodes = node.args[:2]
    letters = split_equation(equation)
    if letters is None or not isinstance(nodes, list | tuple) or len(nodes) != 2:
        return None
    left, right = nodes
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    (left_axes, right_axes), out = letters
    left_sizes, right_sizes = named_sizes(left, left_axes), named_sizes(right, right_axes)

    # An axis of length 1 beside a longer one of the same letter broadcasts, and is not summed over.
    def broadcast(axes: str, own: Mapping[str, str], other: Mapping[str, str]) -> str:
        return "".join("1" if own.get(a) == "1" and other.get(a, "1") != "1" else a for a in axes)

    return Product(
        node,
        left,
        right,
        broadcast(left_axes, left_sizes, right_sizes),
        broadcast(right_axes, right_sizes, left_sizes),
        out,
    )


def split_equation(equation: object) -> tuple[list[str], str] | None:
    """Split an einsum into the letters of operands and result; None where it has an ellipsis or repeats an axis."""
    if not isinstance(equation, str) or "." in equation:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow:  # then the result has the axes that occur once, in alphabetical order
        letters = "".join(operands)
        out = "".join(sorted(a for a in letters if letters.count(a) == 1))
    repeats = any(len(set(axes)) < len(axes) for axes in (*operands, out))
    return None if repeats else (operands, out)


def named_sizes(node: Node, axes: str) -> dict[str, str]:
    """Return the symbolic sizes of a tensor's axes by their letters, as text."""
    return dict(zip(axes, shape_of(node) or (), strict=False))


def shape_of(node: Node) -> tuple[str, ...] | None:
    """Return the symbolic shape of a node's value; as text, since comparing symbols would constrain them."""
    if SHAPE not in node.meta:  # printing symbols is slow
        value = node.meta.get("val")
        node.meta[SHAPE] = tuple(map(str, value.shape)) if isinstance(value, Tensor) else None
    shape: tuple[str, ...] | None = node.meta[SHAPE]
    return shape
