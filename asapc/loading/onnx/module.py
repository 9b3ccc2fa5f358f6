"""Models from ONNX files: a module that runs the nodes of the file, and remembers which node is which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from asapc.errors import CheckpointError
from asapc.loading.inputs import with_signature
from asapc.loading.onnx.call import (
    EVALUATION,
    MAX_ELEMENTS,
    REWRITE,
    Call,
    Operator,
    Value,
    label_of,
    to_array,
    to_dtype,
    to_tensor,
)
from asapc.loading.onnx.compute import COMPUTING
from asapc.loading.onnx.layers import LAYERS
from asapc.loading.onnx.numbers import MAX_NUMBERS, Known, on_numbers
from asapc.loading.onnx.reader import EXPORT, open_batch, opset_of, read_onnx, subgraphs
from asapc.loading.onnx.views import VIEWS
from asapc.loading.untrusted.demand import Demand
from asapc.loading.untrusted.source import Source
from asapc.types.model import InputType, LoadedModel

OPERATORS: dict[str, Operator] = {**COMPUTING, **LAYERS, **VIEWS}
CONTROL = ("If", "Loop")
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
MAX_ITERATIONS = 1000
DATA = "export the model with a fixed number of iterations, and without branches on data"

# Names the values of the file in a graph while it is captured; `capturing.onnx` removes these nodes again.
LIBRARY = torch.library.Library("asapc", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("value(Tensor tensor, str name) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.register_fake("asapc::value")  # type: ignore[untyped-decorator]
def like(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor of the same layout, so that views that follow are the same as without the mark."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class OnnxModule(nn.Module):
    """An ONNX graph as a module in evaluation mode.

    Args:
        source: the file.
        model: what `read_onnx` returns.
        batch: what `open_batch` returned for it.

    Attributes:
        source, model: the same as the arguments, never changed.
        input_names: of the file's inputs; the forward takes them by position.
        input_types, input_sizes: their dtypes, and their sizes as in `types.model.InputType`.
        initializers: names in the file of the module's buffers.

    Raises:
        CheckpointError: it has operators that asapc does not know, or a fixed batch.
    """

    def __init__(self, source: Source, model: Any, batch: int | None = None) -> None:
        super().__init__()
        self.source, self.model, self.batch = source, model, batch
        check_operators(model.graph)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        inputs = list(model.graph.input)
        self.input_names = [value.name for value in inputs]
        self.input_types = [check_input(source, value) for value in inputs]
        self.input_sizes = [open_sizes(value) for value in inputs]
        self.initializers: dict[str, str] = {}
        self.numbers: dict[str, Any] = {}
        constants = [(node.output[0], t) for node in model.graph.node if (t := constant_tensor(node)) is not None]
        for name, proto in [*stored.items(), *constants]:
            self.store(name, proto)
        self.fixed = constant_values(model.graph, {*stored, *(name for name, _ in constants)})
        # torch.export and everything after it ask the forward for its parameters.
        self.__dict__["forward"] = with_signature(self.compute, self.input_names)

    def store(self, name: str, proto: Any) -> None:
        """Register a tensor of the file as a buffer; keep small constants as arrays too."""
        tensor = to_tensor(proto)
        self.register_buffer(buffer := f"w{len(self.initializers)}", tensor)
        self.initializers[buffer] = name
        small = tensor.numel() == 1 or (tensor.numel() <= MAX_NUMBERS and not tensor.is_floating_point())
        if small and tensor.dim() <= 1:
            self.numbers[name] = to_array(proto)

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute all outputs of the file, in its order."""
        values: dict[str, Value] = {}
        demand = Demand(self.source)
        for name, value, dtype in zip(self.input_names, inputs, self.input_types, strict=True):
            if value.dtype != dtype:
                raise TypeError(f"the input {name} takes {dtype}, not {value.dtype}")
            values[name] = value
        for buffer, name in self.initializers.items():
            tensor = getattr(self, buffer)
            values[name] = Known(self.numbers[name], tensor) if name in self.numbers else tensor
        self.run_graph(self.model.graph, values, demand, marked=torch.compiler.is_exporting())
        outputs = (values[value.name] for value in self.model.graph.output)
        return tuple(output.as_tensor() if isinstance(output, Known) else output for output in outputs)

    def run_graph(self, graph: Any, values: dict[str, Value], demand: Demand, marked: bool = False) -> None:
        """Run the nodes of a graph on the values in its scope, and add their outputs to the scope."""
        demand.add_nodes(len(graph.node))
        for node in graph.node:
            if node.output and node.output[0] in values and node.op_type == "Constant":
                continue
            for name, result in zip(node.output, self.run_node(node, values, demand), strict=False):
                if elements(result) > MAX_ELEMENTS:
                    raise CheckpointError(f"the ONNX node {label_of(node)} makes more than fits into memory", REWRITE)
                if name in self.fixed and isinstance(result, Tensor):
                    demand.add_constant(result.numel() * result.itemsize)
                if name and marked and isinstance(result, Tensor):
                    result = torch.ops.asapc.value(result, name)
                values[name] = result

    def run_node(self, node: Any, values: Mapping[str, Value], demand: Demand) -> tuple[Value, ...]:
        """Compute the outputs of one node."""
        inputs = [values[name] if name else None for name in node.input]
        constant = [name in self.fixed for name in node.input]
        call = Call(node.op_type, label_of(node), inputs, attributes_of(node), len(node.output), constant)
        if node.op_type == "If":
            return self.branch(call, values, demand)
        if node.op_type == "Loop":
            return self.unroll(call, values, demand)
        arrays = [value.array for value in inputs if isinstance(value, Known)]
        if arrays and len(arrays) == len(inputs):
            numbers = on_numbers(node.op_type, arrays, number_attributes(node, call.attributes))
            if numbers is not None:
                return (numbers,)
        result = OPERATORS[node.op_type](call)
        return result if isinstance(result, tuple) else (result,)

    def branch(self, call: Call, values: Mapping[str, Value], demand: Demand) -> tuple[Value, ...]:
        """Run an If whose condition does not depend on data."""
        condition = decide(call, call.inputs[0])
        graph = call.get("then_branch") if condition else call.get("else_branch")
        inner = dict(values)
        self.run_graph(graph, inner, demand)
        return tuple(inner[value.name] for value in graph.output)

    def unroll(self, call: Call, values: Mapping[str, Value], demand: Demand) -> tuple[Value, ...]:
        """Unroll a Loop whose number of iterations does not depend on data."""
        body = call.get("body")
        carried: list[Any] = list(call.inputs[2:])
        limit = int(call.numbers(0)[0]) if call.has(0) else MAX_ITERATIONS + 1
        going = decide(call, call.inputs[1]) if call.has(1) else True
        scanned: list[list[Tensor]] = [[] for _ in body.output[1 + len(carried) :]]
        count = 0
        while going and count < limit:
            if count == MAX_ITERATIONS:
                raise call.refuse(f"runs for more than {MAX_ITERATIONS} iterations")
            results = self.iterate(body, values, demand, [Known(np.array(count)), Known(np.array(True)), *carried])
            going, carried = decide(call, results[0]), results[1 : 1 + len(carried)]
            for stack, item in zip(scanned, results[1 + len(carried) :], strict=True):
                stack.append(item.as_tensor() if isinstance(item, Known) else item)
            count += 1
        if scanned and not count:
            raise call.refuse("runs for no iteration")
        return (*carried, *(torch.stack(stack) for stack in scanned))

    def iterate(self, body: Any, values: Mapping[str, Value], demand: Demand, arguments: Sequence[Any]) -> list[Any]:
        """Run the body of a Loop once."""
        inner = {**values, **{value.name: item for value, item in zip(body.input, arguments, strict=True)}}
        self.run_graph(body, inner, demand)
        return [inner[value.name] for value in body.output]


def elements(value: Value) -> int:
    """Count the elements of a tensor, for a batch of one; 0 for numbers."""
    return prod(size for size in value.shape if isinstance(size, int)) if isinstance(value, Tensor) else 0


def decide(call: Call, value: Value | None) -> bool:
    """Evaluate a condition that is known while the graph is captured."""
    if not isinstance(value, Known):
        raise CheckpointError(f"the ONNX node {call.label} ({call.op}) branches on data; a compiled graph cannot", DATA)
    return bool(value.array.item())


def attributes_of(node: Any) -> dict[str, Any]:
    """Return attributes as plain values: tensors as arrays, strings as bytes, graphs as they are."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: to_array(v) if isinstance(v, onnx.TensorProto) else v for name, v in values.items()}


def number_attributes(node: Any, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that matter to `on_numbers`."""
    if node.op_type == "Cast":
        return {"to": onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])}
    return {name: value for name, value in attributes.items() if name != "allowzero" or value}


def constant_tensor(node: Any) -> Any:
    """Return the tensor of a Constant node, None for other nodes."""
    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    return node.attribute[0].t if node.attribute[0].name == "value" else None


def constant_values(graph: Any, constant: set[str]) -> set[str]:
    """Return the names of all values that follow from the file alone."""
    for node in graph.node:
        if node.op_type not in CONTROL and all(name in constant or not name for name in node.input):
            constant |= set(node.output)
    return constant


def check_operators(graph: Any) -> None:
    """Raise CheckpointError for the first node whose operator asapc does not know, or draws random numbers."""
    for node in graph.node:
        standard = node.domain in ("", "ai.onnx")
        if standard and node.op_type in RANDOM:
            raise CheckpointError(
                f"the ONNX node {label_of(node)} ({node.op_type}) draws random numbers, to which nothing can be fitted",
                EVALUATION,
            )
        if not standard or node.op_type not in {*OPERATORS, *CONTROL}:
            operator = node.op_type if standard else f"{node.domain}::{node.op_type}"
            raise CheckpointError(
                f"asapc does not know the operator {operator[:80]} of the ONNX node {label_of(node)}", REWRITE
            )
        for inner in subgraphs(node):
            check_operators(inner)


def check_input(source: Source, value: Any) -> torch.dtype:
    """Return the dtype of an input; raise CheckpointError if its batch is fixed."""
    if not value.type.HasField("tensor_type"):
        raise CheckpointError(f"{source}: its input {value.name} is not a tensor", EXPORT)
    kind = value.type.tensor_type
    if kind.HasField("shape") and (not kind.shape.dim or kind.shape.dim[0].HasField("dim_value")):
        shape = ", ".join(str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim)
        raise CheckpointError(f"{source} has a fixed batch: its input {value.name} is ({shape})", EXPORT)
    try:
        return to_dtype(kind.elem_type)
    except (KeyError, TypeError):
        raise CheckpointError(f"{source}: its input {value.name} holds no numbers", EXPORT) from None


def open_sizes(value: Any) -> tuple[int | None, ...] | None:
    """Return the sizes of an input's axes as far as the file fixes them."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)


@dataclass(frozen=True, eq=False)
class OnnxModel(LoadedModel):
    """A model from an ONNX file.

    Attributes:
        module: the module that runs its nodes.
    """

    module: OnnxModule


def load_onnx(source: Source) -> OnnxModel:
    """Read an ONNX file as a model.

    Raises:
        CheckpointError: it cannot be read safely, has a fixed batch, or operators that asapc does not know.
    """
    model = read_onnx(source)
    batch = open_batch(model)
    module = OnnxModule(source, model, batch).eval()
    for buffer, name in module.initializers.items():
        tensor = getattr(module, buffer)
        if tensor.numel() > MAX_NUMBERS and bool(torch.isnan(tensor).any()):
            raise CheckpointError(f"{source}: {name[:80]} holds NaN", "give one from a successful run")
    kinds = map(InputType, module.input_sizes, module.input_types)
    notes = [f"ONNX, opset {opset_of(model)}, {len(model.graph.node)} nodes"]
    if batch is not None and batch > 0:
        notes.append(f"its batch, fixed at {batch}, is open")
    return OnnxModel(
        module=module,
        path=source.path,
        sha256=source.sha256,
        parameters=sum(t.numel() for t in module.buffers() if t.is_floating_point()),
        calibration=None,
        held_out=None,
        inputs=dict(zip(module.input_names, kinds, strict=True)),
        notes=tuple(notes),
    )
