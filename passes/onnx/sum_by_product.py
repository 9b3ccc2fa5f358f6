"""Writes sums over few numbers that follow on each other as products, for TensorRT's compiler.

TensorRT-RTX 1.7 writes out a sum over an axis of six numbers or fewer, within all that read it. A loop of half-steps on
such plans, each a sum of what the last one gave, takes it up to four times as long, and as much memory, with each
half-step: minutes after nine. With a product by ones in the place of each sum it builds forty in two seconds. Operators
of asapc have such products already; this is for loops that stay as they are. Only the compiler reads this model; the
user's file does not change.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from asapc.passes.base import GraphPass, PassResult
from asapc.passes.onnx.nodes import Parts, attributes_of, opset_of, types_of
from asapc.passes.onnx.unfuse_attention import PRODUCTS

FEW = 8
EXPONENTIALS = ("ReduceLogSumExp", "Softmax", "LogSoftmax")
SUMS = (*EXPONENTIALS, "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "Einsum")
LOWEST = {1: -3.4028235e38, 10: -65504.0, 11: -1.7976931348623157e308, 16: -3.3895314e38}  # by ONNX's element type
FIRST_OPSET, AXES_AS_INPUT = 13, 18  # since when sums take their axes as an input, and other reductions do


class SumByProduct(GraphPass[Any]):
    """Replaces sums over few numbers that depend on others, with no product in between, in a ModelProto, in place."""

    def call(self, program: Any) -> PassResult[Any]:
        """Replace all but the first of each chain; parts of a node are called NODE/PART."""
        nodes = program.graph.node
        opset = opset_of(program)
        sums = {node.output[0] for node in nodes if node.op_type in SUMS}
        if opset < FIRST_OPSET or not following(nodes, sums):
            return PassResult(program, False)
        places = places_of(program)
        replaced = following(nodes, places)
        parts = [
            part
            for node in nodes
            for part in (parts_of(node, places[node.output[0]], opset) if node.output[0] in replaced else [node])
        ]
        del nodes[:]
        nodes.extend(parts)
        return PassResult(program, bool(replaced))


@dataclass(frozen=True)
class Place:
    """What a sum goes over: an axis, its length, how many axes there are, and ONNX's number of the element type."""

    axis: int
    length: int
    rank: int
    kind: int


def following(nodes: Iterable[Any], sums: Collection[str]) -> set[str]:
    """Return those of some sums, by the name of what they give, that depend on another with no product in between."""
    dependent: set[str] = set()
    found: set[str] = set()
    for node in nodes:
        follows = not dependent.isdisjoint(node.input)
        is_sum = node.output[0] in sums
        if is_sum and follows:
            found.add(node.output[0])
        if is_sum or (follows and node.op_type not in PRODUCTS):
            dependent.update(node.output)
    return found


def places_of(program: Any) -> dict[str, Place]:
    """Return what sums over few numbers go over, by the name of what they give."""
    from onnx import numpy_helper

    types = types_of(program)
    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    places: dict[str, Place] = {}
    for node in program.graph.node:
        attributes = attributes_of(node)
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = attributes["value"]
        if node.op_type not in SUMS or node.input[0] not in types:
            continue
        if "Softmax" in node.op_type:
            axes = [attributes.get("axis", -1)]
        elif node.op_type == "Einsum":
            axes = summed_axes(attributes["equation"].decode()) if len(node.input) == 1 else []
        elif node.input[1:]:
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist() if node.input[1] in constants else []
        else:
            axes = attributes.get("axes", [])
        value = types[node.input[0]].tensor_type
        sizes = value.shape.dim
        if len(axes) == 1 and len(sizes) > 1 and value.elem_type in LOWEST:
            axis = axes[0] % len(sizes)
            if 0 < sizes[axis].dim_value <= FEW:
                places[node.output[0]] = Place(axis, sizes[axis].dim_value, len(sizes), value.elem_type)
    return places


def summed_axes(equation: str) -> list[int]:
    """Return the one axis, counted from the last, over which an equation of one operand sums if it does no more."""
    letters, _, kept = equation.replace(" ", "").partition("->")
    summed = [letter for letter in letters if letter not in kept]
    if len(summed) != 1 or letters.replace(summed[0], "") != kept or "." in letters[letters.index(summed[0]) :]:
        return []
    return [letters.index(summed[0]) - len(letters)]


def parts_of(node: Any, place: Place, opset: int) -> list[Any]:
    """Return the nodes that take a sum's place."""
    from onnx.helper import make_tensor

    axis, last = place.axis, place.rank - 1
    parts = Parts(node)
    add = parts.add

    def constant(part: str, shape: list[int], value: float) -> str:
        count = shape[0] * shape[1] if shape else 1
        return add("Constant", [], part, value=make_tensor(part, place.kind, shape, [value] * count))

    def total(terms: str, weight: float = 1.0) -> str:
        if axis == last - 1:
            return add("MatMul", [constant("ones", [1, place.length], weight), terms], "sum")
        ones = constant("ones", [place.length, 1], weight)
        if axis == last:
            return add("MatMul", [terms, ones], "sum")
        swap = list(range(place.rank))
        swap[axis], swap[last] = last, axis
        turned = add("MatMul", [add("Transpose", [terms], "turned", perm=swap), ones], "turned_sum")
        return add("Transpose", [turned], "sum", perm=swap)

    x = node.input[0]
    if node.op_type in EXPONENTIALS:
        as_attribute = opset < AXES_AS_INPUT
        axes = [] if as_attribute else [add("Constant", [], "axes", value_ints=[axis])]
        largest = add("ReduceMax", [x, *axes], "any_largest", **({"axes": [axis]} if as_attribute else {}))
        largest = add("Max", [largest, constant("lowest", [], LOWEST[place.kind])], "largest")  # if all is -inf
        apart = add("Sub", [x, largest], "apart")
        exponentials = add("Exp", [apart], "exponentials")
        of_all = total(exponentials)
        if node.op_type == "Softmax":
            add("Div", [exponentials, of_all], "shares")
        else:
            log = add("Log", [of_all], "log")
            add(*(("Sub", [apart, log]) if node.op_type == "LogSoftmax" else ("Add", [log, largest])), "logs")
    elif node.op_type == "ReduceL1":
        total(add("Abs", [x], "absolute"))
    elif node.op_type == "ReduceL2":
        add("Sqrt", [total(add("Mul", [x, x], "squared"))], "norm")
    else:
        total(x, 1 / place.length if node.op_type == "ReduceMean" else 1.0)
    if not attributes_of(node).get("keepdims", 1) or node.op_type == "Einsum":
        add("Squeeze", [parts.nodes[-1].output[0], add("Constant", [], "summed", value_ints=[axis])], "squeezed")
    return parts.in_place()
