"""Names what TensorRT's compiler refuses, and why, before it is started.

The compiler says so in its own words, after minutes where models are large, and does not always say at which node. Each
rule here was tried: the compiler refuses a graph that breaks it, and builds one that differs in that alone
(`tests/backends/test_preflight.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asapc.errors import BuildError
from asapc.passes.onnx.standard_attention import StandardAttention

MAX_SORT = 3840  # the largest K of a TopK
Ranges = Mapping[str, Mapping[int, tuple[int, int]]]  # of open axes, by the input's name and their number


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a value of a graph: its element type in ONNX's numbers, and its sizes, None where unknown."""

    kind: int
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class Fault:
    """Why the compiler refuses a node, and what helps."""

    why: str
    hint: str


Values = Mapping[str, Value]
Rule = Callable[[Any, Values], Fault | None]


def preflight(path: Path, largest_batch: int, ranges: Ranges) -> None:
    """Refuse an ONNX file that TensorRT cannot build, with the node that is to blame.

    Args:
        path: the file.
        largest_batch: largest size of the first axis of every input, unless `ranges` has one.
        ranges: least and largest sizes of open axes.

    Raises:
        BuildError: it breaks a rule.
    """
    model = at_largest(load(path), largest_batch, ranges)
    values = values_of(model.graph)
    for node in nodes_of(model.graph):
        fault = next(filter(None, (rule(node, values) for rule in RULES)), None)
        if fault is not None:
            name = node.name or node.output[0]
            raise BuildError(f"TensorRT cannot build {node.op_type} ({name}): {fault.why}", fault.hint, name)


def load(path: Path) -> Any:
    """Return the ModelProto of a file, in standard operators as the compiler gets it, without external data.

    Raises:
        BuildError: it is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise BuildError(f"{path.name} is not an ONNX model: {error}", "report the model") from error
    return StandardAttention()(model).program


def at_largest(model: Any, largest_batch: int, ranges: Ranges) -> Any:
    """Return a model with its open axes at their largest sizes, and all shapes that follow from them."""
    import onnx

    for value in model.graph.input:
        largest = {0: largest_batch} | {axis: most for axis, (_, most) in ranges.get(value.name, {}).items()}
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if not size.HasField("dim_value") and axis in largest:
                size.dim_value = largest[axis]
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT64:  # which sizes are; weights would be copied twice
            tensor.ClearField("raw_data")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def values_of(graph: Any) -> dict[str, Value]:
    """Return what is known of all values of a graph."""
    values = {tensor.name: Value(tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        values[value.name] = Value(kind.elem_type, sizes)
    return values


def nodes_of(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, and of those inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


def long_sort(node: Any, values: Values) -> Fault | None:
    """TopK gives no more than MAX_SORT elements."""
    if node.op_type != "TopK":
        return None
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
    sizes = values[node.output[0]].sizes if node.output[0] in values else ()
    count = sizes[axis] if sizes else None
    if count is None or count <= MAX_SORT:
        return None
    return Fault(
        f"it sorts {count:,} elements, and TensorRT at most {MAX_SORT:,}",
        "shorten that axis, by --dynamic where it is open, or compile for --target onnx",
    )
