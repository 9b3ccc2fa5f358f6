"""Reads ONNX files of strangers: checks what a file claims before relying on it, and runs nothing.

In a file that passes, tensors are as large as their data, external data lies in the file's own folder, operators are
those of the ONNX standard, and onnx.checker finds no fault.
"""

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import inliner

from asapc.errors import CheckpointError
from asapc.loading.untrusted.demand import Demand
from asapc.loading.untrusted.source import Source

# Protobuf has no larger files, and the compiled model is one file, external data included.
MAX_FILE = 2**31 - 2**20
MIN_OPSET = 13
MIN_IR = 3
IR_OF_INITIALIZERS = 4  # from which on initializers need not be inputs
MAX_SUBGRAPH_DEPTH = 16  # graphs within graphs
EXPORT = (
    'export it with a dynamic batch: dynamic_shapes={"NAME": {0: Dim("batch")}} or dynamic_axes={"NAME": {0: "batch"}}'
)
UPGRADE = "convert it with onnx.version_converter.convert_version(model, 18), or export it anew with opset_version=18"


def read_onnx(source: Source) -> Any:
    """Read the model in a file: a ModelProto with all data inside it.

    Raises:
        CheckpointError: it is damaged, claims more than it holds, leads out of its folder, or is of a kind that
            asapc does not read.
    """
    if source.size > MAX_FILE:
        raise source.refuse(f"it has {source.size:,} bytes, more than an ONNX file can have")
    with source.reading():
        model = onnx.load_model_from_string(source.path.read_bytes())
    check_versions(source, model)
    Demand(source).add_nodes(inlined_nodes(source, model))
    total = source.size
    for tensor in list(tensors_in(source, model)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            total += load_external(source, tensor)
            if total > MAX_FILE:
                raise source.refuse(f"with its external data it has more than {MAX_FILE:,} bytes")
        check_tensor(source, tensor)
    if model.functions:
        with source.reading():
            model = inliner.inline_local_functions(model)
    drop_default_inputs(model)
    sort_nodes(source, model.graph)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's own errors, and whatever a damaged model triggers in it
        why = " ".join((str(error).strip() or type(error).__name__).split())[:200]
        hint = "give a file that onnx.checker accepts"
        raise CheckpointError(f"onnx.checker refuses {source}: {why}", hint) from None
    return model


def inlined_nodes(source: Source, model: Any) -> int:
    """Count the nodes of a model once its functions stand where they are called, without putting them there.

    Raises:
        CheckpointError: a function calls itself.
    """
    functions = {(function.domain, function.name): function for function in model.functions}
    calls = {key: operators_in(source, function) for key, function in functions.items()}
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError:
        raise source.refuse("its functions call each other without end") from None
    counts: dict[tuple[str, str], int] = {}
    for key in order:
        counts[key] = sum(counts[call] for call in calls[key]) if key in calls else 1
    return sum(counts.get(operator, 1) for operator in operators_in(source, model.graph))


def operators_in(source: Source, root: Any) -> list[tuple[str, str]]:
    """Return domain and name of the operator of each node of a graph or function, and of the graphs within."""
    return [(node.domain, node.op_type) for graph in graphs_in(source, root) for node in graph.node]


def drop_default_inputs(model: Any) -> None:
    """Make constants of inputs that have a default, in place: files of before IR version 4 list all constants so."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, IR_OF_INITIALIZERS)


def open_batch(model: Any) -> int | None:
    """Give a model whose inputs have one fixed batch an open one, in place; whether it can do with it, a run shows.

    Returns:
        The batch that it had, -1 where its exporter wrote that for any; None where none was fixed.
    """
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.input]
    sizes = {dims[0].dim_value if dims and dims[0].HasField("dim_value") else None for dims in shapes}
    batch = sizes.pop() if len(sizes) == 1 else None
    if batch is not None:
        del model.graph.value_info[:]  # which repeat it
        for value in [*model.graph.input, *model.graph.output]:
            dims = value.type.tensor_type.shape.dim
            if dims and dims[0].HasField("dim_value") and dims[0].dim_value == batch:
                dims[0].dim_param = "batch"
    return batch


def sort_nodes(source: Source, graph: Any) -> None:
    """Put the nodes of a graph behind those whose results they read, in place; leave those that are so already.

    Raises:
        CheckpointError: they read each other's results.
    """
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    reads = [[maker[name] for name in names_read(node) if name in maker] for node in graph.node]
    if all(index < i for i, indices in enumerate(reads) for index in indices):
        return
    try:
        order = list(TopologicalSorter(dict(enumerate(reads))).static_order())
    except CycleError:
        raise source.refuse("its nodes read each other's results") from None
    nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)


def names_read(node: Any) -> Iterator[str]:
    """Yield the names of values that a node reads, also within its graphs."""
    yield from node.input
    for inner in subgraphs(node):
        for inner_node in inner.node:
            yield from names_read(inner_node)
        yield from (value.name for value in inner.output)


def check_self_contained(source: Source) -> None:
    """Refuse a file that refers to others: ONNX Runtime would read them.

    Raises:
        CheckpointError: it does, or is damaged.
    """
    with source.reading():
        model = onnx.load_model_from_string(source.path.read_bytes())
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_in(source, model)):
        raise source.refuse("its data lies in other files")


def check_versions(source: Source, model: Any) -> None:
    """Refuse what is not a model, and versions of ONNX that asapc does not read."""
    if not model.graph.node or not model.graph.input or not model.graph.output:
        raise source.refuse()
    newest = onnx.defs.onnx_opset_version()
    opset = opset_of(model)
    if not MIN_OPSET <= opset <= newest:
        raise CheckpointError(f"{source} has opset {opset}; asapc reads {MIN_OPSET} to {newest}", UPGRADE)
    if not MIN_IR <= model.ir_version <= onnx.IR_VERSION:
        raise CheckpointError(
            f"{source} has IR version {model.ir_version}; asapc reads {MIN_IR} to {onnx.IR_VERSION}", UPGRADE
        )


def opset_of(model: Any) -> int:
    """Return the version of the ONNX standard that a model is written in; 0 where it names none."""
    return max((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def tensors_in(source: Source, model: Any) -> Iterator[Any]:
    """Yield all tensors of a model, including those in attributes and in graphs within graphs."""
    for graph in graphs_in(source, model.graph, *model.functions):
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        sparse = any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in attributes)
        if sparse or len(getattr(graph, "sparse_initializer", ())):
            raise CheckpointError(f"{source} holds sparse tensors, which asapc does not read", "store them dense")
        yield from getattr(graph, "initializer", ())
        for attribute in attributes:
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors


def graphs_in(source: Source, *roots: Any) -> Iterator[Any]:
    """Yield graphs and functions, and all graphs within them."""
    stack = [(root, 0) for root in roots]
    while stack:
        graph, depth = stack.pop()
        if depth > MAX_SUBGRAPH_DEPTH:
            raise source.refuse("it nests graphs too deeply")
        yield graph
        stack += [(inner, depth + 1) for node in graph.node for inner in subgraphs(node)]


def subgraphs(node: Any) -> Iterator[Any]:
    """Yield the graphs in the attributes of a node."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else []
        yield from attribute.graphs


def load_external(source: Source, tensor: Any) -> int:
    """Load the data of a tensor from another file into the tensor, and return its number of bytes.

    Raises:
        CheckpointError: the file lies outside the model's folder, or does not hold what the tensor claims.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    label = f"{source}: the external data {location[:80]!r} of {tensor.name[:80]}"
    hint = "keep external data beside the model, or store it inside: onnx.save(onnx.load(path), path)"
    beside = path_beside(source.path, location)
    if beside is None:
        raise CheckpointError(f"{label} leads out of the model's folder", hint)
    size = Source.at(beside, CheckpointError).size
    needed = data_bytes(source, tensor)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", size - offset))  # onnx reads the rest of the file too
    except ValueError:
        raise CheckpointError(f"{label} has no valid offset or length", hint) from None
    if offset < 0 or length != needed or offset + length > size:
        raise CheckpointError(f"{label} should be {needed:,} bytes at {offset:,}; the file has {size:,}", hint)
    if length > MAX_FILE:
        raise CheckpointError(f"{label} has {length:,} bytes, more than one file can hold", hint)
    with beside.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = data
    return length


def path_beside(path: Path, location: str) -> Path | None:
    """Return the path of a location in the folder of a file, None where it leads out of that folder."""
    if not location or Path(location).is_absolute() or ".." in Path(location).parts or "\0" in location:
        return None
    beside = path.parent / location
    # A hub's cache keeps the files elsewhere, all in one folder, and links under their names to them.
    folders = path.parent.resolve(), path.resolve().parent
    return beside if any(beside.resolve().is_relative_to(folder) for folder in folders) else None


def data_bytes(source: Source, tensor: Any) -> int:
    """Compute the bytes that the data of a tensor takes, from its dtype and shape."""
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError):
        itemsize = 0
    if itemsize == 0 or tensor.data_type in unsupported_types():
        raise CheckpointError(
            f"{source}: {tensor.name[:80] or 'a constant'} is of a type that asapc does not read",
            "use floats of 16, 32 or 64 bits, integers and booleans",
        )
    if min(tensor.dims, default=0) < 0:
        raise source.refuse(f"{tensor.name[:80]} has a negative size")
    return int(prod(tensor.dims) * itemsize)


def unsupported_types() -> set[int]:
    """Return the types of ONNX other than those of plain tensors: strings, packed and complex numbers."""
    proto = onnx.TensorProto
    plain = (proto.FLOAT, proto.DOUBLE, proto.FLOAT16, proto.BFLOAT16, proto.BOOL, proto.INT64, proto.INT32)
    return set(proto.DataType.values()) - {*plain, proto.INT16, proto.INT8, proto.UINT8}


def check_tensor(source: Source, tensor: Any) -> None:
    """Refuse a tensor whose shape claims more or less than its data."""
    needed = data_bytes(source, tensor)
    if tensor.HasField("raw_data"):
        same = len(tensor.raw_data) == needed
    else:
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        same = sum(map(len, fields)) == prod(tensor.dims)
    if not same:
        shape = " x ".join(map(str, tensor.dims)) or "a scalar"
        raise source.refuse(f"{tensor.name[:80]} is {shape}, but its data is not")
