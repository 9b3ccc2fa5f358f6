"""One table of the operators of ONNX that compute, each with the function of torch that computes the same."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asapc.loading.onnx.call import EVALUATION, Call, Operator, to_dtype


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """Wrap a function of one tensor."""
    return lambda call: function(call.tensor(0))


def elementwise(function: Callable[..., Any]) -> Operator:
    """Wrap a function of two tensors or numbers, folded over all inputs."""

    def apply(call: Call) -> Tensor:
        first, *rest = call.operands()
        if not isinstance(first, Tensor) and not any(isinstance(other, Tensor) for other in rest):
            first = call.tensor(0)
        for other in rest:
            first = function(first, other)
        result: Tensor = first
        return result

    return apply


def as_tensors(function: Callable[..., Tensor]) -> Operator:
    """Wrap as `elementwise` does, for functions that take no plain numbers."""

    def apply(call: Call) -> Tensor:
        first, *rest = (call.tensor(i) for i in range(len(call.inputs)))
        for other in rest:
            first = function(first, other)
        return first

    return apply


def divide(left: Any, right: Any) -> Tensor:
    """Divide; integers towards zero."""
    tensor = left if isinstance(left, Tensor) else right
    if tensor.is_floating_point():
        return torch.as_tensor(left / right)
    return torch.div(left, right, rounding_mode="trunc")


def modulo(call: Call) -> Tensor:
    """Compute Mod: the result has the sign of the divisor, with `fmod` that of the dividend."""
    function = torch.fmod if call.get("fmod") else torch.remainder
    return function(call.tensor(0), call.tensor(1))


def power(base: Any, exponent: Any) -> Tensor:
    """Compute Pow: the result has the type of the base."""
    result: Tensor = base**exponent
    return result.to(base.dtype) if isinstance(base, Tensor) else result


def where(call: Call) -> Tensor:
    """Compute Where; at most one branch may be a plain number, since two would choose their own dtype."""
    left, right = call.operands()[1:]
    if not isinstance(left, Tensor) and not isinstance(right, Tensor):
        left = call.tensor(1)
    return torch.where(call.tensor(0), left, right)


def clip(call: Call) -> Tensor:
    """Compute Clip; the bounds are scalars."""
    lower, upper = [*call.operands(), None, None][1:3]
    if lower is None and upper is None:
        return call.tensor(0)
    return torch.clamp(call.tensor(0), min=lower, max=upper)


def axes_of(call: Call, rank: int) -> list[int]:
    """Return the axes of a reduction, from its attribute or its second input; all, or none, where it names none."""
    axes = call.get("axes", call.numbers(1) if call.has(1) else [])
    if not axes:
        return [] if call.get("noop_with_empty_axes") else list(range(rank))
    return [int(axis) for axis in axes]


def reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    """Wrap a reduction over some axes."""

    def apply(call: Call) -> Tensor:
        tensor = call.tensor(0)
        axes = axes_of(call, tensor.dim())
        return function(tensor, axes, bool(call.get("keepdims", 1))) if axes else tensor

    return apply


def product(tensor: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Multiply over several axes, which torch does for one at a time only."""
    for axis in sorted((axis % tensor.dim() for axis in axes), reverse=True):
        tensor = tensor.prod(dim=axis, keepdim=keep)
    return tensor


def matmul(call: Call) -> Tensor:
    """Compute MatMul; with a matrix of weights it is what torch calls a linear layer."""
    left, right = call.tensor(0), call.tensor(1)
    if right.dim() == 2 and left.dim() > 1 and call.constant[1] and not call.constant[0]:
        return F.linear(left, right.t())
    return torch.matmul(left, right)


def gemm(call: Call) -> Tensor:
    """Compute Gemm: alpha * A @ B + beta * C, of matrices."""
    left = call.tensor(0).t() if call.get("transA") else call.tensor(0)
    right = call.tensor(1) if call.get("transB") else call.tensor(1).t()
    alpha, beta, addend = call.get("alpha", 1.0), call.get("beta", 1.0), call.optional(2)
    if alpha == beta == 1 and (addend is None or addend.dim() == 1) and call.constant[1]:
        return F.linear(left, right, addend)
    result = torch.matmul(left, right.t())
    result = result if alpha == 1 else result * alpha
    if addend is None:
        return result
    return result + (addend if beta == 1 else addend * beta)


def cumsum(call: Call) -> Tensor:
    """Compute CumSum along one axis."""
    tensor, axis = call.tensor(0), int(call.numbers(1)[0])
    tensor = tensor.flip(axis) if call.get("reverse") else tensor
    total = tensor.cumsum(axis)
    total = total - tensor if call.get("exclusive") else total
    return total.flip(axis) if call.get("reverse") else total


def extreme_index(function: Callable[..., Tensor]) -> Operator:
    """Compute ArgMax or ArgMin."""

    def apply(call: Call) -> Tensor:
        if call.get("select_last_index"):
            raise call.refuse("selects the last of equal entries")
        return function(call.tensor(0), dim=call.get("axis", 0), keepdim=bool(call.get("keepdims", 1)))

    return apply


def topk(call: Call) -> tuple[Tensor, ...]:
    """Compute TopK: values and indices."""
    size, axis = int(call.numbers(1)[0]), call.get("axis", -1)
    largest, ordered = bool(call.get("largest", 1)), bool(call.get("sorted", 1))
    values, indices = torch.topk(call.tensor(0), size, axis, largest, ordered)
    return values, indices


def dropout(call: Call) -> Tensor:
    """Compute Dropout, which does nothing unless the model was exported in training mode."""
    ratio = call.numbers(1)[0] if call.has(1) else 0.5
    if call.has(2) and any(call.numbers(2)) and ratio:
        raise call.refuse("drops at random: the model was exported in training mode", EVALUATION)
    return call.tensor(0)


def isinf(call: Call) -> Tensor:
    """Compute IsInf, of one sign or both."""
    tensor = call.tensor(0)
    if call.get("detect_positive", 1) and call.get("detect_negative", 1):
        return torch.isinf(tensor)
    return torch.isposinf(tensor) if call.get("detect_positive", 1) else torch.isneginf(tensor)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
    "Identity": lambda tensor: tensor,
}
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": divide,
    "Pow": power,
    "Sum": operator.add,
    "Equal": operator.eq,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
}
OF_TENSORS: dict[str, Callable[..., Tensor]] = {
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "PRelu": lambda tensor, slope: torch.where(tensor >= 0, tensor, tensor * slope),
}
REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(dim=axes, keepdim=keep).to(x.dtype),
    "ReduceMean": lambda x, axes, keep: x.mean(dim=axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(dim=axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(dim=axes, keepdim=keep),
    "ReduceProd": product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(dim=axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(dim=axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(dim=axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(dim=axes, keepdim=keep),
}
COMPUTING: dict[str, Operator] = {
    **{name: unary(function) for name, function in UNARY.items()},
    **{name: elementwise(function) for name, function in ELEMENTWISE.items()},
    **{name: as_tensors(function) for name, function in OF_TENSORS.items()},
    **{name: reduction(function) for name, function in REDUCTIONS.items()},
    "Mean": lambda call: as_tensors(torch.add)(call) / len(call.inputs),
    "Mod": modulo,
    "Where": where,
    "Clip": clip,
    "Cast": lambda call: call.tensor(0).to(to_dtype(call.get("to"))),
    "CastLike": lambda call: call.tensor(0).to(call.tensor(1).dtype),
    "IsInf": isinf,
    "Gelu": lambda call: F.gelu(call.tensor(0), approximate=call.get("approximate", b"none").decode()),
    "Elu": lambda call: F.elu(call.tensor(0), call.get("alpha", 1.0)),
    "LeakyRelu": lambda call: F.leaky_relu(call.tensor(0), call.get("alpha", 0.01)),
    "HardSigmoid": lambda call: (call.get("alpha", 0.2) * call.tensor(0) + call.get("beta", 0.5)).clamp(0, 1),
    "Softmax": lambda call: torch.softmax(call.tensor(0), dim=call.get("axis", -1)),
    "LogSoftmax": lambda call: torch.log_softmax(call.tensor(0), dim=call.get("axis", -1)),
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": lambda call: torch.einsum(
        call.get("equation").decode(), *(call.tensor(i) for i in range(len(call.inputs)))
    ),
    "CumSum": cumsum,
    "ArgMax": extreme_index(torch.argmax),
    "ArgMin": extreme_index(torch.argmin),
    "TopK": topk,
    "Dropout": dropout,
}
