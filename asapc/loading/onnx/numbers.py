"""Does the shape arithmetic of ONNX graphs on numbers, so that it stays out of the captured graph.

ONNX has tensors only, so `x.reshape(batch, -1)` is exported as Shape, Gather, Concat and Reshape. torch expects numbers
there, and the size of the batch as a symbol. So small constants, sizes and all that follows from them are numpy arrays;
those that hold the symbol are arrays of objects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
MAX_NUMBERS = 64  # larger constants are tensors
MAX_RANGE = 2**20


@dataclass(frozen=True, eq=False)
class Known:
    """A value whose numbers are known while the graph is captured.

    Attributes:
        array: the numbers, with `torch.SymInt` among them where they depend on the size of the batch.
        tensor: the same as a tensor, where there is one.
    """

    array: Array
    tensor: Tensor | None = None

    @property
    def symbolic(self) -> bool:
        """Tell whether it depends on the size of the batch."""
        return self.array.dtype == object

    def as_tensor(self) -> Tensor:
        """Convert the value to a tensor."""
        if self.tensor is not None:
            return self.tensor
        if not self.symbolic:
            return torch.from_numpy(np.array(self.array))
        parts = [torch.scalar_tensor(item, dtype=torch.int64) for item in self.array.flatten()]
        return torch.stack(parts).reshape(self.array.shape)


def wrap(items: Any) -> Known:
    """Wrap numbers; an array of objects that are all integers becomes one of int64."""
    array = np.asarray(items)
    if array.dtype == object and all(isinstance(item, int | np.integer) for item in array.flatten()):
        array = array.astype(np.int64)
    return Known(array)


def sizes(shape: Sequence[Any]) -> Known:
    """Wrap the shape of a tensor."""
    array = np.empty(len(shape), dtype=object)
    array[:] = list(shape)
    return wrap(array)


def divide(left: Array, right: Array) -> Array:
    """Compute ONNX's Div: integers are divided towards zero."""
    if left.dtype.kind == "f":
        return np.asarray(left / right)
    quotient = left // right
    if object in (left.dtype, right.dtype):
        return np.asarray(quotient)  # sizes are never negative
    return np.asarray(quotient + ((quotient < 0) & (quotient * right != left)))


def cut(array: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None) -> Array:
    """Compute ONNX's Slice."""
    places = [slice(None)] * array.ndim
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        step = 1 if steps is None else int(steps.flatten()[i])
        axis = i if axes is None else int(axes.flatten()[i])
        places[axis] = slice(start, None if step < 0 and end < -array.shape[axis] else end, step)
    return array[tuple(places)]


def drop_axes(array: Array, axes: Array | None = None) -> Array:
    """Squeeze of ONNX."""
    return np.squeeze(array, None if axes is None else tuple(axes.tolist()))


def fill(array: Array, shape: Array) -> Array:
    """Expand of ONNX, for few numbers."""
    if shape.dtype == object:
        raise TypeError
    target = np.broadcast_shapes(array.shape, tuple(shape.tolist()))
    if np.prod(target, dtype=float) > MAX_NUMBERS:
        raise TypeError
    return np.broadcast_to(array, target)


def count_up(start: Array, limit: Array, delta: Array) -> Array:
    """Compute ONNX's Range."""
    if object in (start.dtype, limit.dtype, delta.dtype) or abs((limit - start) / delta) > MAX_RANGE:
        raise TypeError
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def reshape(array: Array, shape: Array) -> Array:
    """Reshape of ONNX."""
    if shape.dtype == object:
        raise TypeError
    return array.reshape([array.shape[i] if size == 0 else int(size) for i, size in enumerate(shape.tolist())])


def power(left: Array, right: Array) -> Array:
    """Compute ONNX's Pow: the result has the type of the base."""
    return np.asarray(np.power(left, right)).astype(left.dtype)


def numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of numpy, whose result on objects need not be an array."""
    return lambda *arrays: np.asarray(function(*arrays))


# Operators without attributes. One that raises TypeError leaves its case to the operators of tensors.
ON_INPUTS: Mapping[str, Callable[..., Array]] = {
    "Add": numbers(np.add),
    "Sub": numbers(np.subtract),
    "Mul": numbers(np.multiply),
    "Div": divide,
    "Mod": numbers(np.mod),
    "Pow": power,
    "Sqrt": numbers(np.sqrt),
    "Reciprocal": lambda a: np.asarray(1 / a, dtype=a.dtype),
    "Neg": numbers(np.negative),
    "Exp": numbers(np.exp),
    "Log": numbers(np.log),
    "Floor": numbers(np.floor),
    "Ceil": numbers(np.ceil),
    "Abs": numbers(np.abs),
    "Min": lambda *arrays: np.asarray(np.minimum.reduce(arrays)),
    "Max": lambda *arrays: np.asarray(np.maximum.reduce(arrays)),
    "Equal": lambda a, b: np.asarray(np.equal(a, b)).astype(bool),
    "Less": lambda a, b: np.asarray(np.less(a, b)).astype(bool),
    "LessOrEqual": lambda a, b: np.asarray(np.less_equal(a, b)).astype(bool),
    "Greater": lambda a, b: np.asarray(np.greater(a, b)).astype(bool),
    "GreaterOrEqual": lambda a, b: np.asarray(np.greater_equal(a, b)).astype(bool),
    "And": numbers(np.logical_and),
    "Or": numbers(np.logical_or),
    "Not": numbers(np.logical_not),
    "Where": numbers(np.where),
    "Identity": lambda a: a,
    "Slice": cut,
    "Squeeze": drop_axes,
    "Unsqueeze": lambda a, axes: np.expand_dims(a, tuple(axes.tolist())),
    "Expand": fill,
    "Range": count_up,
    "Reshape": reshape,
}


def cast(array: Array, dtype: Any) -> Array:
    """Cast of ONNX."""
    if array.dtype == object:
        if np.dtype(dtype).kind != "i":
            raise TypeError
        return array
    return array.astype(dtype)


def constant_of_shape(shape: Array, value: Array | None) -> Array:
    """Compute ONNX's ConstantOfShape, for few numbers."""
    if shape.dtype == object or np.prod(shape, dtype=float) > MAX_NUMBERS:
        raise TypeError
    return np.full(tuple(shape.tolist()), np.float32(0) if value is None else value.flatten()[0])


def reduce_prod(array: Array, attributes: Mapping[str, Any]) -> Array:
    """Compute ONNX's ReduceProd over a whole list."""
    if array.ndim > 1:
        raise TypeError
    total = np.asarray(np.multiply.reduce(array.reshape(-1)))
    return total.reshape(1) if attributes.get("keepdims", 1) else total


def gather(array: Array, index: Array, attributes: Mapping[str, Any]) -> Array:
    """Gather of ONNX."""
    return np.asarray(np.take(array, index, axis=attributes.get("axis", 0)), dtype=array.dtype)


def concat(arrays: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    """Compute ONNX's Concat, of arrays that may hold symbols."""
    return np.concatenate(arrays, axis=attributes["axis"])


def on_numbers(op: str, arrays: Sequence[Array], attributes: Mapping[str, Any]) -> Known | None:
    """Apply an operator to known numbers; return None where it is left to tensors."""
    try:
        if op in ON_INPUTS and not attributes:
            return wrap(ON_INPUTS[op](*arrays))
        match op:
            case "Gather":
                return wrap(gather(arrays[0], arrays[1], attributes))
            case "Concat":
                return wrap(concat(arrays, attributes))
            case "Cast":
                return wrap(cast(arrays[0], attributes["to"]))
            case "ConstantOfShape":
                return wrap(constant_of_shape(arrays[0], attributes.get("value")))
            case "ReduceProd" if len(arrays) == 1:
                return wrap(reduce_prod(arrays[0], attributes))
            case "Size":
                return wrap(np.asarray(arrays[0].size))
    except TypeError:
        pass
    return None
