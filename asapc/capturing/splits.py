"""Splits an axis of which the batch is a factor, as models do that keep heads in the batch: `x.split(batch)`.

How many parts that gives, torch.export asks of the example, and then refuses other batches. Where the length is a
multiple of the part's for every batch, the parts are those of a reshape, which asks nothing.
"""

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode

SPLIT: set[Any] = {torch.split, Tensor.split}
CHUNK: set[Any] = {torch.chunk, Tensor.chunk}


class EvenSplits(TorchFunctionMode):
    """Replaces, while active, splits into equal parts whose number is the same for every batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Split evenly where that is possible; do anything else as without this mode."""
        kwargs = kwargs or {}
        is_count = func in CHUNK
        if is_count or func in SPLIT:
            tensor, parts, dim = split_arguments(*args, **kwargs)
            count = number_of_parts(tensor.shape[dim], parts, is_count)
            if count is not None:
                return tensor.unflatten(dim, (count, tensor.shape[dim] // count)).unbind(dim if dim >= 0 else dim - 1)
        return func(*args, **kwargs)


def split_arguments(*args: Any, dim: int = 0, **kwargs: Any) -> tuple[Any, Any, int]:
    """Return the tensor, the size or number of its parts, and the axis, as all forms of the functions name them."""
    values = (*args, *kwargs.values())
    tensor = next(value for value in values if isinstance(value, Tensor))
    parts, *axis = (value for value in values if value is not tensor)
    return tensor, parts, axis[0] if axis else dim


def number_of_parts(length: Any, parts: Any, is_count: bool) -> int | None:
    """Return into how many equal parts an open length is split, None where that may differ or is not known.

    Args:
        length: the axis's.
        parts: their length, or with `is_count` their number.
        is_count: which of the two.
    """
    if not isinstance(length, SymInt) or not isinstance(parts, int | SymInt):
        return None
    factor, _ = length.node.expr.as_coeff_Mul()
    if is_count:
        return parts if isinstance(parts, int) and factor.is_Integer and factor % parts == 0 else None
    ratio = length.node.expr / (parts.node.expr if isinstance(parts, SymInt) else parts)
    return int(ratio) if ratio.is_Integer else None
