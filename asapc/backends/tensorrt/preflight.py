"""Names what TensorRT's compiler refuses, and why, before it is started.

The compiler says so in its own words, after minutes where models are large, and does not always say at which node. Each
rule here was tried: TensorRT-RTX refuses a graph that breaks it, and builds one that differs in that alone
(`tests/backends/test_preflight.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from asapc.errors import BuildError
from asapc.passes.base import PassManager
from asapc.passes.onnx.inline_attention import InlineAttention
from asapc.passes.onnx.standard_attention import StandardAttention
from asapc.types.engine import Sizes

MAX_SORT = 3840  # the largest K of a TopK; longer sites get no slices
MAX_NUMBERS = 64  # beyond which a constant holds no sizes
COUNT = "{}_count"  # a value that is not in the model: its shape is what one of the model holds

# ONNX's numbers of element types.
KINDS = {1: "float32", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 12: "uint32", 13: "uint64"}
UNKNOWN_KINDS = ("int16", "uint16", "uint32", "uint64")
DATA_DEPENDENT = ("NonZero", "Compress", "Unique")
UNKNOWN = (
    *("AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
    *("CenterCropPad", "Col2Im", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT", "DeformConv", "Det"),
    *("DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix"),
    *("Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement"),
    *("QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty"),
    *("SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss"),
    *("SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer"),
)
STANDARD = "replace it in the model by standard operators, or compile for --target onnx"

OpenSizes = Mapping[str, Mapping[int, Sizes]]  # of open axes, by the input's name and their number


@dataclass(frozen=True)
class Value:
    """What is known of a value: its element type in ONNX's numbers, and its sizes, None for unknown ones."""

    kind: int
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class Fault:
    """Why the compiler refuses a node, and what helps."""

    why: str
    hint: str


Rule = Callable[[Any, Mapping[str, Value]], Fault | None]
NOTHING = Value(0, ())


def preflight(package: str, path: Path, largest_batch: int, sizes: OpenSizes) -> None:
    """Refuse an ONNX file that TensorRT cannot build, with the node that is to blame.

    Args:
        package: of the builder, `tensorrt` or `tensorrt_rtx`.
        path: the file.
        largest_batch: largest size of the first axis of every input, unless `sizes` has one.
        sizes: of open axes.

    Raises:
        BuildError: it is not an ONNX file, or breaks a rule.
    """
    model = at_largest(load(path), largest_batch, sizes)
    values = values_of(model.graph)
    of_model = {(function.domain, function.name) for function in model.functions}
    for node in nodes_of(model.graph):
        if (node.domain, node.op_type) in of_model:
            continue
        fault = next(filter(None, (rule(node, values) for rule in RULES[package])), None)
        if fault is not None:
            name = node.name or node.output[0]
            raise BuildError(f"TensorRT cannot build {node.op_type} ({name}): {fault.why}", fault.hint, name)


def load(path: Path) -> Any:
    """Return the ModelProto of a file, in the operators that the compiler gets, without external data.

    Raises:
        BuildError: it is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise BuildError(f"{path.name} is not an ONNX model: {error}", "report the model") from error
    return PassManager([InlineAttention(), StandardAttention()])(model).program


def at_largest(model: Any, largest_batch: int, sizes: OpenSizes) -> Any:
    """Return a model with its open axes at their largest sizes, and all shapes that follow from them."""
    import onnx

    for value in model.graph.input:
        largest = {0: largest_batch} | {axis: most for axis, (_, _, most) in sizes.get(value.name, {}).items()}
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and axis in largest:
                dim.dim_value = largest[axis]
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for tensor in model.graph.initializer:
        if prod(tensor.dims) > MAX_NUMBERS:
            tensor.ClearField("raw_data")  # a weight, which inference would copy
    # Inference computes numbers too, but shows them as shapes alone.
    for name in {node.input[1] for node in model.graph.node if node.op_type == "TopK"}:
        model.graph.node.append(onnx.helper.make_node("ConstantOfShape", [name], [COUNT.format(name)]))
    with suppress(onnx.shape_inference.InferenceError):  # of a model at odds with itself, which the parser judges
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return model


def values_of(graph: Any) -> dict[str, Value]:
    """Return what is known of the values of a graph."""
    values = {tensor.name: Value(tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        sizes = tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
        values[value.name] = Value(kind.elem_type, sizes)
    return values


def nodes_of(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, and those inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


def long_sort(node: Any, values: Mapping[str, Value]) -> Fault | None:
    """TopK gives no more than MAX_SORT elements."""
    if node.op_type != "TopK":
        return None
    (count,) = values.get(COUNT.format(node.input[1]), NOTHING).sizes or (None,)
    if count is None or count <= MAX_SORT:
        return None
    why = f"it gives {count} elements in order, and TensorRT no more than {MAX_SORT}"
    return Fault(why, "replace the sort in the model; where --dynamic opens its axis, lower the upper end")


def unknown_operator(node: Any, values: Mapping[str, Value]) -> Fault | None:
    """The parser has a counterpart of most standard operators, and of no others."""
    if node.domain not in ("", "ai.onnx"):
        return Fault(f"it is of the domain {node.domain}, outside of the ONNX standard", STANDARD)
    if node.op_type in DATA_DEPENDENT:
        why = "the shape of its result depends on the data, as that of a tensor indexed by a boolean mask does"
        return Fault(why, "select by torch.where, or by multiplication with the mask, in the model")
    return Fault("TensorRT has no such operator", STANDARD) if node.op_type in UNKNOWN else None


def reduced_scatter(node: Any, values: Mapping[str, Value]) -> Fault | None:
    """Scatters replace what is there; they do not add to it."""
    reduction = next((attribute.s for attribute in node.attribute if attribute.name == "reduction"), b"none")
    if node.op_type not in ("ScatterElements", "ScatterND") or reduction == b"none":
        return None
    why = f"it scatters with the reduction {reduction.decode()}"
    return Fault(why, "express it by a product with a one-hot matrix in the model, or scatter without reduction")


def integer_product(node: Any, values: Mapping[str, Value]) -> Fault | None:
    """Matrices of integers, as of masks that were not cast to floats, are not multiplied."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    kinds = [KINDS.get(values.get(name, NOTHING).kind) for name in node.input[:2]]
    kind = next((kind for kind in kinds if kind in ("int32", "int64")), None)
    return Fault(f"it multiplies matrices of {kind}", "cast them to floats in the model") if kind else None


def unknown_type(node: Any, values: Mapping[str, Value]) -> Fault | None:
    """Integers are of 32 and 64 bits, with a sign."""
    for name in (*node.input, *node.output):
        kind = KINDS.get(values.get(name, NOTHING).kind)
        if kind in UNKNOWN_KINDS:
            return Fault(f"{name} is {kind}, which TensorRT does not have", "use int32 or int64 in the model")
    return None


# Of TensorRT proper, which no machine without a GPU can try, what NVIDIA documents.
RULES: Mapping[str, Sequence[Rule]] = {
    "tensorrt": (long_sort,),
    "tensorrt_rtx": (long_sort, unknown_operator, reduced_scatter, integer_product, unknown_type),
}
