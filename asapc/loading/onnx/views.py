"""The operators of ONNX that move, select and create entries; sizes and axes are numbers, never tensors."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asapc.loading.onnx.call import Call, Operator
from asapc.loading.onnx.numbers import MAX_NUMBERS, Known, sizes

FOREVER = 2**31 - 1  # ends of slices at and beyond this mean "to the end"


def shape_of(call: Call) -> Known:
    """Compute Shape, from `start` to `end`."""
    value = call.inputs[0]
    shape = value.array.shape if isinstance(value, Known) else call.tensor(0).shape
    return sizes(shape[call.get("start", 0) : call.get("end")])


def size_of(call: Call) -> Known:
    """Compute Size: the number of entries."""
    total: Any = 1
    for size in call.tensor(0).shape:
        total = total * size
    return sizes([total]) if isinstance(total, torch.SymInt) else Known(sizes([total]).array.reshape(()))


def reshape(call: Call) -> Tensor:
    """Reshape; 0 keeps a size."""
    tensor, shape = call.tensor(0), call.numbers(1)
    if not call.get("allowzero"):
        # Compared only where it is a number: to compare a symbol would constrain the batch.
        shape = [tensor.shape[i] if isinstance(size, int) and size == 0 else size for i, size in enumerate(shape)]
    return tensor.reshape(shape)


def flatten(call: Call) -> Tensor:
    """Flatten to a matrix."""
    tensor = call.tensor(0)
    axis = call.get("axis", 1)
    axis = axis + tensor.dim() if axis < 0 else axis
    if axis == 0:
        return tensor.reshape(1, -1)
    if axis == 1:
        return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
    rows: Any = 1
    for size in tensor.shape[:axis]:
        rows = rows * size
    return tensor.reshape(rows, -1)


def transpose(call: Call) -> Tensor:
    """Compute Transpose; without axes it reverses their order."""
    tensor = call.tensor(0)
    return tensor.permute(call.get("perm", list(reversed(range(tensor.dim())))))


def squeeze(call: Call) -> Tensor:
    """Squeeze the axes that it names, else all of length 1."""
    tensor = call.tensor(0)
    if call.has(1):
        axes = call.numbers(1)
    else:
        axes = [axis for axis, size in enumerate(tensor.shape) if isinstance(size, int) and size == 1]
    return tensor.squeeze(tuple(axes)) if axes else tensor


def unsqueeze(call: Call) -> Tensor:
    """Compute Unsqueeze; the axes are those of the result."""
    tensor, axes = call.tensor(0), call.numbers(1)
    for axis in sorted(axis % (tensor.dim() + len(axes)) for axis in axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def expand(call: Call) -> Tensor:
    """Expand, in both directions."""
    tensor, shape = call.tensor(0), call.numbers(1)
    missing = tensor.dim() - len(shape)
    shape = [1] * missing + shape
    current = [1] * (len(shape) - tensor.dim()) + list(tensor.shape)
    target = [old if isinstance(size, int) and size == 1 else size for old, size in zip(current, shape, strict=True)]
    return tensor.expand(call.limit(target))


def concat(call: Call) -> Tensor:
    """Compute Concat."""
    return torch.cat([call.tensor(i) for i in range(len(call.inputs))], dim=call.get("axis"))


def split(call: Call) -> tuple[Tensor, ...]:
    """Split into parts of the sizes in its input, else into equal ones of which the last may be smaller."""
    tensor, axis = call.tensor(0), call.get("axis", 0)
    if call.has(1):
        return tuple(torch.split(tensor, call.numbers(1), dim=axis))
    count = call.get("num_outputs", call.outputs)
    size = -(-tensor.shape[axis] // count)
    return tuple(torch.split(tensor, size, dim=axis))


def cut(call: Call) -> Tensor:
    """Slice along some axes."""
    tensor = call.tensor(0)
    starts, ends = call.numbers(1), call.numbers(2)
    axes = call.numbers(3) if call.has(3) else list(range(len(starts)))
    steps = call.numbers(4) if call.has(4) else [1] * len(starts)
    places = [slice(None)] * tensor.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            tensor = tensor.index_select(axis, backwards(call, tensor.shape[axis], start, end, step))
        else:
            last = None if isinstance(end, int) and end >= FOREVER else end
            places[axis] = slice(start if isinstance(start, torch.SymInt) or start else None, last, step)
    return tensor[tuple(places)] if any(place != slice(None, None, 1) for place in places) else tensor


def backwards(call: Call, size: Any, start: int, end: int, step: int) -> Tensor:
    """Return the indices of a slice with a negative step, which torch cannot take as a slice."""
    if not isinstance(size, int):
        raise call.refuse("runs backwards over the batch")
    indices = range(size)[slice(start, None if end < -size else end, step)]
    return torch.tensor(list(indices), dtype=torch.long)


def gather(call: Call) -> Tensor:
    """Gather whole slices; from a table of weights it is what torch calls an embedding."""
    tensor, axis, index = call.tensor(0), call.get("axis", 0), call.inputs[1]
    if isinstance(index, Known) and index.array.ndim == 0 and not index.symbolic:
        return tensor.select(axis, int(index.array))
    places = call.tensor(1)
    if axis == 0 and tensor.dim() == 2 and call.constant[0] and not call.constant[1]:
        return F.embedding(places, tensor)
    places = within(places, tensor.shape[axis], isinstance(index, Known))
    if places.dim() == 1:
        return tensor.index_select(axis, places)
    axis = axis % tensor.dim()
    slices = tensor.index_select(axis, places.reshape(-1))
    return slices.reshape([*tensor.shape[:axis], *places.shape, *tensor.shape[axis + 1 :]])


def within(places: Tensor, size: Any, constant: bool) -> Tensor:
    """Count indices from the front, where they count from the end; constant ones need no node in the graph for it."""
    places = places.long()
    if constant and not bool((places < 0).any()):
        return places
    return torch.where(places < 0, places + size, places)


def gather_elements(call: Call) -> Tensor:
    """Compute GatherElements."""
    tensor, axis = call.tensor(0), call.get("axis", 0)
    return torch.gather(tensor, axis, within(call.tensor(1), tensor.shape[axis], False))


def gather_nd(call: Call) -> Tensor:
    """Compute GatherND without batch axes."""
    if call.get("batch_dims", 0):
        raise call.refuse("has batch_dims")
    return call.tensor(0)[tuple(call.tensor(1).long().unbind(-1))]


def scatter_nd(call: Call) -> Tensor:
    """Compute a ScatterND that replaces."""
    if call.get("reduction", b"none") != b"none":
        raise call.refuse("reduces what it scatters")
    return call.tensor(0).index_put(call.tensor(1).long().unbind(-1), call.tensor(2))


def scatter_elements(call: Call) -> Tensor:
    """Compute a ScatterElements that replaces."""
    if call.get("reduction", b"none") != b"none":
        raise call.refuse("reduces what it scatters")
    tensor, axis = call.tensor(0), call.get("axis", 0)
    return torch.scatter(tensor, axis, within(call.tensor(1), tensor.shape[axis], False), call.tensor(2))


def tile(call: Call) -> Tensor:
    """Compute Tile."""
    tensor, repeats = call.tensor(0), call.numbers(1)
    call.limit([size * times for size, times in zip(tensor.shape, repeats, strict=True)])
    return tensor.repeat(repeats)


def pad(call: Call) -> Tensor:
    """Pad with one value."""
    if call.get("mode", b"constant") != b"constant":
        raise call.refuse("pads with something other than a constant")
    tensor, pads = call.tensor(0), call.numbers(1)
    value = call.numbers(2)[0] if call.has(2) else 0
    axes = [axis % tensor.dim() for axis in call.numbers(3)] if call.has(3) else list(range(tensor.dim()))
    ends = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    both = [ends.get(axis, (0, 0)) for axis in range(tensor.dim())]
    call.limit(
        [size + sum(pair) if isinstance(size, int) else size for size, pair in zip(tensor.shape, both, strict=True)]
    )
    return F.pad(tensor, [size for pair in reversed(both) for size in pair], value=value)


def triangle(call: Call) -> Tensor:
    """Compute Trilu."""
    diagonal = int(call.numbers(1)[0]) if call.has(1) else 0
    return (torch.triu if call.get("upper", 1) else torch.tril)(call.tensor(0), diagonal)


def count_up(call: Call) -> Tensor:
    """Compute a Range whose ends are known; the size of the batch counts as known."""
    start, limit, delta = (call.numbers(i)[0] for i in range(3))
    if all(isinstance(bound, int | float) for bound in (start, limit, delta)):
        call.limit([int(max((limit - start) / delta, 0)) + 1])
    return torch.arange(start, limit, delta)


def constant_of_shape(call: Call) -> Tensor:
    """Compute ConstantOfShape."""
    value = call.get("value")
    shape = call.limit(call.numbers(0))
    if value is None:
        return torch.zeros(shape)
    return torch.full(shape, value.item(), dtype=torch.from_numpy(value).dtype)


def eye_like(call: Call) -> Tensor:
    """Compute EyeLike, of the dtype of its input."""
    tensor = call.tensor(0)
    if call.get("k", 0) or call.get("dtype") or tensor.dim() != 2:
        raise call.refuse("is more than an identity matrix")
    return torch.eye(*tensor.shape, dtype=tensor.dtype)


def constant(call: Call) -> Known | Tensor:
    """Compute a Constant inside a graph within the graph; those outside are read with the weights."""
    for name, dtype in (("value_int", np.int64), ("value_float", np.float32)):
        for attribute in (name, name + "s"):
            if attribute in call.attributes:
                return Known(np.array(call.get(attribute), dtype=dtype))
    value = call.get("value")
    if value is None:
        raise call.refuse("holds no numbers")
    small = value.size <= MAX_NUMBERS and value.ndim <= 1
    return Known(value) if small else torch.from_numpy(value)


VIEWS: dict[str, Operator] = {
    "Constant": constant,
    "Shape": shape_of,
    "Size": size_of,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Concat": concat,
    "Split": split,
    "Slice": cut,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterND": scatter_nd,
    "ScatterElements": scatter_elements,
    "Tile": tile,
    "Pad": pad,
    "Trilu": triangle,
    "Range": count_up,
    "ConstantOfShape": constant_of_shape,
    "EyeLike": eye_like,
}
