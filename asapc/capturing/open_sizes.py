"""Replaces, while a model is traced, calls by which torch asks the example for a size that is open.

torch.export refuses other sizes then. Models that keep heads in the batch split it, `x.split(batch)`, and the number of
parts is asked for; where the length is a multiple of the part's for every batch, the parts are those of a reshape.
Distances, `torch.cdist`, are computed by products from 26 points on; with open lengths they always are.
"""

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode

SPLIT: set[Any] = {torch.split, Tensor.split}
CHUNK: set[Any] = {torch.chunk, Tensor.chunk}


class OpenSizes(TorchFunctionMode):
    """Replaces, while active, what asks for open sizes and need not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Split evenly and take distances by products where sizes are open; do all else as without this mode."""
        kwargs = kwargs or {}
        is_count = func in CHUNK
        if is_count or func in SPLIT:
            tensor, parts, dim = split_arguments(*args, **kwargs)
            count = number_of_parts(tensor.shape[dim], parts, is_count)
            if count is not None:
                return tensor.unflatten(dim, (count, tensor.shape[dim] // count)).unbind(dim if dim >= 0 else dim - 1)
        if func is torch.cdist:
            return func(**with_products(*args, **kwargs))
        return func(*args, **kwargs)


def with_products(
    x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> dict[str, Any]:
    """Return the arguments of `torch.cdist`, by products where that would depend on an open number of points."""
    if compute_mode.endswith("if_necessary") and any(isinstance(x.shape[-2], SymInt) for x in (x1, x2)):
        compute_mode = "use_mm_for_euclid_dist"
    return {"x1": x1, "x2": x2, "p": p, "compute_mode": compute_mode}


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
