"""Reads ONNX files of strangers: looks through what a file claims before anything follows it, and runs nothing.

What passes has tensors as large as their data, data inside the file's own folder, operators of the ONNX standard, and
onnx.checker's consent.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import onnx

from asapc.errors import CheckpointError
from asapc.loading.untrusted.files import check_file
from asapc.loading.untrusted.refusals import unreadable
from asapc.loading.untrusted.tensors import damage

# Protobuf has no larger files; what is compiled comes out as one file, external data included.
MAX_FILE = 2**31 - 2**20
MIN_OPSET = 13
MIN_IR = 4
DEEPEST = 16  # graphs within graphs
EXPORT = (
    'export it with a dynamic batch: dynamic_shapes={"NAME": {0: Dim("batch")}} or dynamic_axes={"NAME": {0: "batch"}}'
)
UPGRADE = "convert it with onnx.version_converter.convert_version(model, 18), or export it anew with opset_version=18"


def read_onnx(path: Path) -> Any:
    """The model in a file, a ModelProto with all data inside it.

    Raises:
        CheckpointError: it is damaged, claims more than it holds, leads out of its folder, or is of a kind that
            asapc does not read.
    """
    size = check_file(path, CheckpointError)
    if size > MAX_FILE:
        raise unreadable(path, CheckpointError, f"it has {size:,} bytes, more than an ONNX file can")
    with damage(path, CheckpointError):
        model = onnx.load_model_from_string(path.read_bytes())
    check_versions(path, model)
    total = size
    for tensor in list(tensors_in(path, model)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            total += load_external(path, tensor)
            if total > MAX_FILE:
                raise unreadable(path, CheckpointError, f"with its external data it has more than {MAX_FILE:,} bytes")
        check_tensor(path, tensor)
    if model.functions:
        with damage(path, CheckpointError):
            model = onnx.inliner.inline_local_functions(model)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's own errors, and whatever a damaged model triggers in it
        why = " ".join((str(error).strip() or type(error).__name__).split())[:200]
        raise CheckpointError(f"onnx.checker refuses {path}: {why}", "give a file that onnx.checker accepts") from None
    return model


def check_versions(path: Path, model: Any) -> None:
    """Refuse what is no model, and versions of ONNX that asapc does not read."""
    if not model.graph.node or not model.graph.input or not model.graph.output:
        raise unreadable(path, CheckpointError)
    newest = onnx.defs.onnx_opset_version()
    opset = opset_of(model)
    if not MIN_OPSET <= opset <= newest:
        raise CheckpointError(f"{path} has opset {opset}; asapc reads {MIN_OPSET} to {newest}", UPGRADE)
    if not MIN_IR <= model.ir_version <= onnx.IR_VERSION:
        raise CheckpointError(
            f"{path} has IR version {model.ir_version}; asapc reads {MIN_IR} to {onnx.IR_VERSION}", UPGRADE
        )


def opset_of(model: Any) -> int:
    """Version of the ONNX standard that a model is written in; 0 where it does not say."""
    return max((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def tensors_in(path: Path, model: Any) -> Iterator[Any]:
    """All tensors of a model, those in attributes and in graphs within graphs too."""
    stack = [(model.graph, 0)] + [(function, 0) for function in model.functions]
    while stack:
        graph, depth = stack.pop()
        if depth > DEEPEST:
            raise unreadable(path, CheckpointError, "it nests graphs too deeply")
        yield from getattr(graph, "initializer", ())
        if getattr(graph, "sparse_initializer", ()):
            raise CheckpointError(f"{path} holds sparse tensors, which asapc does not read", "store them dense")
        for node in graph.node:
            for attribute in node.attribute:
                yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    raise CheckpointError(f"{path} holds sparse tensors, which asapc does not read", "store them dense")
                inner = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
                stack += [(g, depth + 1) for g in inner]


def load_external(path: Path, tensor: Any) -> int:
    """Put the data of a tensor that lies in another file into the tensor; how many bytes these are.

    Raises:
        CheckpointError: the file lies outside the model's folder, or does not hold what the tensor claims.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    shown = f"{path}: the external data {location[:80]!r} of {tensor.name[:80]}"
    hint = "keep external data beside the model, or store it inside: onnx.save(onnx.load(path), path)"
    if not location or Path(location).is_absolute() or ".." in Path(location).parts or "\0" in location:
        raise CheckpointError(f"{shown} leads out of the model's folder", hint)
    source = folder / location
    if not source.resolve().is_relative_to(folder):
        raise CheckpointError(f"{shown} leads out of the model's folder", hint)
    held = check_file(source, CheckpointError)
    needed = data_bytes(path, tensor)
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(needed)))
    except ValueError:
        raise CheckpointError(f"{shown} has no readable place", hint) from None
    if offset < 0 or length != needed or offset + length > held:
        raise CheckpointError(f"{shown} should be {needed:,} bytes at {offset:,}; the file has {held:,}", hint)
    if length > MAX_FILE:
        raise CheckpointError(f"{shown} has {length:,} bytes, more than one file can hold", hint)
    with source.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = data
    return length


def data_bytes(path: Path, tensor: Any) -> int:
    """Bytes that the data of a tensor takes, by its dtype and shape."""
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError):
        itemsize = 0
    if itemsize == 0 or tensor.data_type in unsupported_types():
        raise CheckpointError(
            f"{path}: {tensor.name[:80] or 'a constant'} is of a type that asapc does not read",
            "use floats of 16, 32 or 64 bits, integers and booleans",
        )
    if min(tensor.dims, default=0) < 0:
        raise unreadable(path, CheckpointError, f"{tensor.name[:80]} has a negative size")
    return int(prod(tensor.dims) * itemsize)


def unsupported_types() -> set[int]:
    """Types of ONNX that are not those of plain tensors: texts, packed and complex numbers."""
    proto = onnx.TensorProto
    plain = (proto.FLOAT, proto.DOUBLE, proto.FLOAT16, proto.BFLOAT16, proto.BOOL, proto.INT64, proto.INT32)
    return set(proto.DataType.values()) - {*plain, proto.INT16, proto.INT8, proto.UINT8}


def check_tensor(path: Path, tensor: Any) -> None:
    """Refuse a tensor whose shape claims more or less than its data."""
    needed = data_bytes(path, tensor)
    if tensor.HasField("raw_data"):
        same = len(tensor.raw_data) == needed
    else:
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        same = sum(map(len, fields)) == prod(tensor.dims)
    if not same:
        shape = " x ".join(map(str, tensor.dims)) or "a scalar"
        raise unreadable(path, CheckpointError, f"{tensor.name[:80]} is {shape}, and its data is not")
