"""One node of an ONNX graph as operators see it: its inputs, its attributes, and the error where they do not fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from asapc.errors import CheckpointError
from asapc.loading.onnx.numbers import Known

Value = Tensor | Known
Operator = Callable[["Call"], Any]

# Elements of one tensor for one batch of samples. A graph may ask for any size, however small its file.
MAX_ELEMENTS = 2**32
EVALUATION = "export the model in evaluation mode, after model.eval(), and without noise of its own"
REWRITE = "export the model without it, or give its weights with --model, or a torch.export archive"


@dataclass(frozen=True, eq=False)
class Call:
    """A node and the values of its inputs.

    Attributes:
        op: the operator's name in ONNX.
        label: what messages call the node.
        inputs: values, None where an optional one is omitted.
        attributes: plain Python values; tensors are arrays.
        outputs: number of outputs that the node names.
        constant: for each input, whether it follows from the file alone.
    """

    op: str
    label: str
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    outputs: int = 1
    constant: Sequence[bool] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def has(self, index: int) -> bool:
        """Return whether the node has an input."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def tensor(self, index: int) -> Tensor:
        """Return an input as a tensor."""
        value = self.inputs[index] if self.has(index) else None
        if value is None:
            raise self.refuse(f"lacks input {index}")
        return value.as_tensor() if isinstance(value, Known) else value

    def optional(self, index: int) -> Tensor | None:
        """Return an input as a tensor, None where it is omitted."""
        return self.tensor(index) if self.has(index) else None

    def numbers(self, index: int) -> list[Any]:
        """Return an input whose numbers must be known: axes, sizes and the like; sizes of the batch are symbols."""
        value = self.inputs[index] if self.has(index) else None
        if not isinstance(value, Known):
            problem = "lacks its" if value is None else "depends on data in its"
            raise self.refuse(f"{problem} input {index}, which must be known")
        return list(value.array.flatten().tolist())

    def operands(self) -> list[Any]:
        """Return the inputs of an elementwise operator; single numbers as such, since they adopt the other's dtype."""
        rank = max((value.dim() for value in self.inputs if isinstance(value, Tensor)), default=-1)

        def operand(index: int, value: Value | None) -> Any:
            number = isinstance(value, Known) and value.array.size == 1 and value.array.ndim <= rank
            return value.array.item() if isinstance(value, Known) and number else self.optional(index)

        return [operand(index, value) for index, value in enumerate(self.inputs)]

    def limit(self, shape: Sequence[Any]) -> list[Any]:
        """Return a shape if a tensor of it fits into memory."""
        total = 1
        for size in shape:
            total *= size if isinstance(size, int) else 1
        if total > MAX_ELEMENTS or any(isinstance(size, int) and size < 0 for size in shape):
            raise self.refuse("makes a tensor larger than memory")
        return list(shape)

    def refuse(self, why: str, hint: str = REWRITE) -> CheckpointError:
        """Return the error that says why a node cannot be read."""
        return CheckpointError(f"the ONNX node {self.label} ({self.op}) {why}", hint)


def label_of(node: Any) -> str:
    """Return what messages call a node: its name, else that of its first output."""
    return str(node.name or next(iter(node.output), "") or node.op_type)[:200]


def to_dtype(elem_type: int) -> torch.dtype:
    """Return the dtype of torch for a type of ONNX."""
    if elem_type == onnx.TensorProto.BFLOAT16:
        return torch.bfloat16
    return torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(elem_type))).dtype


def to_tensor(proto: Any) -> Tensor:
    """Convert a tensor of ONNX to torch."""
    array = onnx.numpy_helper.to_array(proto)
    if proto.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def to_array(proto: Any) -> Any:
    """Convert a tensor of ONNX to an array, bfloat16 to float32."""
    array = onnx.numpy_helper.to_array(proto)
    return array.astype(np.float32) if proto.data_type == onnx.TensorProto.BFLOAT16 else np.array(array)
