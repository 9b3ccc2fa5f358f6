"""The operators of ONNX that are layers: normalisation, convolution and pooling."""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from asapc.loading.onnx.call import Call, Operator

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
MAXIMA = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
MEANS = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def layer_norm(call: Call) -> Tensor:
    """Compute LayerNormalization, its first output only."""
    only_first(call)
    tensor, scale, bias = call.tensor(0), call.tensor(1), call.optional(2)
    shape = tensor.shape[call.get("axis", -1) :]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(tensor, shape, scale, bias, call.get("epsilon", 1e-5))
    normal = F.layer_norm(tensor, shape, None, None, call.get("epsilon", 1e-5)) * scale
    return normal if bias is None else normal + bias


def rms_norm(call: Call) -> Tensor:
    """Compute RMSNormalization."""
    tensor = call.tensor(0)
    axes = list(range(call.get("axis", -1) % tensor.dim(), tensor.dim()))
    square = tensor.square().mean(dim=axes, keepdim=True)
    return tensor * torch.rsqrt(square + call.get("epsilon", 1e-5)) * call.tensor(1)


def batch_norm(call: Call) -> Tensor:
    """Compute BatchNormalization with the statistics from training."""
    if call.get("training_mode"):
        raise call.refuse("normalises by the batch: the model was exported in training mode")
    only_first(call)
    tensor, scale, bias, mean, var = (call.tensor(i) for i in range(5))
    return F.batch_norm(tensor, mean, var, scale, bias, False, eps=call.get("epsilon", 1e-5))


def instance_norm(call: Call) -> Tensor:
    """Compute InstanceNormalization."""
    return F.instance_norm(call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=call.get("epsilon", 1e-5))


def only_first(call: Call) -> None:
    """Refuse a layer whose statistics are outputs too."""
    if call.outputs > 1:
        raise call.refuse("has more outputs than the first")


def padding(call: Call, rank: int) -> tuple[list[int], list[int]]:
    """Return the padding of the spatial axes, at their starts and at their ends."""
    mode = call.get("auto_pad", b"NOTSET")
    if mode not in (b"NOTSET", b"VALID", b""):
        raise call.refuse(f"pads with auto_pad {mode.decode(errors='replace')[:20]}")
    pads = list(call.get("pads", [0] * 2 * rank)) if mode != b"VALID" else [0] * 2 * rank
    if len(pads) != 2 * rank:
        raise call.refuse("has pads that do not fit its input")
    return pads[:rank], pads[rank:]


def pad_ends(tensor: Tensor, begin: list[int], end: list[int], value: float) -> Tensor:
    """Pad the spatial axes of a tensor."""
    return F.pad(tensor, [size for pair in reversed(list(zip(begin, end, strict=True))) for size in pair], value=value)


def convolution(call: Call) -> Tensor:
    """Compute Conv over one, two or three axes."""
    tensor = call.tensor(0)
    rank = tensor.dim() - 2
    if tensor.dim() not in CONVOLUTIONS:
        raise call.refuse(f"works on {rank} spatial axes")
    begin, end = padding(call, rank)
    if begin != end:
        tensor, begin = pad_ends(tensor, begin, end, 0.0), [0] * rank
    strides, dilations = (list(call.get(name, [1] * rank)) for name in ("strides", "dilations"))
    function = CONVOLUTIONS[tensor.dim()]
    result: Tensor = function(tensor, call.tensor(1), call.optional(2), strides, begin, dilations, call.get("group", 1))
    return result


def max_pool(call: Call) -> Tensor:
    """Compute MaxPool, its first output only."""
    only_first(call)
    tensor, kernel = call.tensor(0), list(call.get("kernel_shape"))
    rank = len(kernel)
    if tensor.dim() not in MAXIMA:
        raise call.refuse(f"works on {rank} spatial axes")
    begin, end = padding(call, rank)
    if any(begin + end):
        tensor = pad_ends(tensor, begin, end, -inf)
    strides, dilations = (list(call.get(name, [1] * rank)) for name in ("strides", "dilations"))
    if call.get("ceil_mode"):
        raise call.refuse("rounds its size up")
    result: Tensor = MAXIMA[tensor.dim()](tensor, kernel, strides, 0, dilations)
    return result


def average_pool(call: Call) -> Tensor:
    """Compute AveragePool."""
    tensor, kernel = call.tensor(0), list(call.get("kernel_shape"))
    rank = len(kernel)
    if tensor.dim() not in MEANS or call.get("ceil_mode") or any(d != 1 for d in call.get("dilations", [])):
        raise call.refuse("pools in a way that asapc does not support")
    begin, end = padding(call, rank)
    if begin != end:
        raise call.refuse("pads its ends differently")
    function = MEANS[tensor.dim()]
    strides, include_pad = list(call.get("strides", [1] * rank)), bool(call.get("count_include_pad"))
    result: Tensor = function(tensor, kernel, strides, begin, False, include_pad)
    return result


def spatial(tensor: Tensor) -> list[int]:
    """Return the axes after samples and channels."""
    return list(range(2, tensor.dim()))


LAYERS: dict[str, Operator] = {
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "Conv": convolution,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": lambda call: call.tensor(0).mean(dim=spatial(call.tensor(0)), keepdim=True),
    "GlobalMaxPool": lambda call: call.tensor(0).amax(dim=spatial(call.tensor(0)), keepdim=True),
}
