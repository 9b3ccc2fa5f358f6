"""Documents and checks the shape of a tensor, in one line."""

import torch


def check_shape(dims: dict[str, int], tensor: torch.Tensor, spec: str) -> None:
    """Bind the named axes of `spec` to the tensor's sizes and compare them with earlier bindings.

    Args:
        dims: sizes by axis name, extended in place; share one dict among the tensors of a call.
        tensor: the tensor to check.
        spec: axis names separated by spaces, e.g. "B H N D".

    Raises:
        ValueError: the rank differs from `spec`, or a named axis differs in size from before.
    """
    names = spec.split()
    if tensor.dim() != len(names):
        raise ValueError(f"expected a tensor of shape ({spec}), got {tuple(tensor.shape)}")
    for name, size in zip(names, tensor.shape, strict=True):
        if dims.setdefault(name, size) != size:
            raise ValueError(f"axis {name} of ({spec}) has size {size}, expected {dims[name]}")
