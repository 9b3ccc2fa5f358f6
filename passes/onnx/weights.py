"""ONNX models without their weights, and with made-up ones in their place.

What a runtime does, and how long that takes, depends on the shapes of weights and hardly on their values: such a model
is the same work, without what must be kept or may not be given away.
"""

import json
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from asapc.passes.onnx.splice import inner_graphs

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

MAX_KEPT = 1024  # values of a constant that stays as it is: a shape, a factor, a small matrix of zeros and ones
STATISTICS = (
    "asapc.weights"  # the metadata that says place, mean and standard deviation of each constant without values
)


def without_weights(model: "ModelProto") -> "ModelProto":
    """Return a copy of a model without the values of its weights, which keeps their means and standard deviations.

    Weights are floating constants of more than MAX_KEPT values, all finite; a mask with infinities stays whole. What
    exporters noted on nodes is left out too.
    """
    from onnx import ModelProto, TensorProto, numpy_helper

    copy = ModelProto()
    copy.CopyFrom(model)
    statistics = []
    for index, tensor in enumerate(tensors(copy)):
        if prod(tensor.dims) <= MAX_KEPT or not is_floating(tensor):
            continue
        values = numpy_helper.to_array(tensor).astype(np.float64)
        if not np.isfinite(values).all():
            continue
        statistics.append([index, float(values.mean()), float(values.std())])
        tensor.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
    for part in (copy, copy.graph, *nodes(copy)):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    copy.metadata_props.add(key=STATISTICS, value=json.dumps(statistics))
    return copy


def with_made_up_weights(model: "ModelProto", seed: int = 0) -> "ModelProto":
    """Return a copy of what `without_weights` returned, with random weights of the same means and deviations.

    Raises:
        ValueError: the statistics are none, or belong to another model.
    """
    from onnx import ModelProto, helper, numpy_helper

    copy, draw = ModelProto(), np.random.default_rng(seed)
    copy.CopyFrom(model)
    places = list(tensors(copy))
    (statistics,) = (json.loads(entry.value) for entry in copy.metadata_props if entry.key == STATISTICS)
    for index, mean, deviation in statistics:
        tensor = places[index]
        values = draw.normal(mean, deviation, tuple(tensor.dims))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
    return copy


def tensors(model: "ModelProto") -> Iterator["TensorProto"]:
    """Yield the constants of a model, in inner graphs and functions too, in an order that depends on nothing else."""
    yield from model.graph.initializer
    for node in nodes(model):
        for inner in inner_graphs(node):
            yield from inner.initializer
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def nodes(model: "ModelProto") -> Iterator[Any]:
    """Yield the nodes of a model, in inner graphs and functions too."""
    remaining = [model.graph, *model.functions]
    while remaining:
        graph = remaining.pop()
        yield from graph.node
        remaining += [inner for node in graph.node for inner in inner_graphs(node)]


def is_floating(tensor: "TensorProto") -> bool:
    """Return whether a constant holds floating numbers."""
    from onnx import TensorProto

    return tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
