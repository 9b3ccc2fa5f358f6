"""What is known of the values of an ONNX model."""

from typing import Any


def types_of(program: Any) -> dict[str, Any]:
    """Return the types of a ModelProto's inputs, constants, and of what is computed of them, as TypeProtos by name."""
    import onnx

    graph = program.graph
    inferred = onnx.shape_inference.infer_shapes(program, data_prop=True).graph
    types = {value.name: value.type for value in (*graph.input, *inferred.value_info, *graph.output)}
    return types | {t.name: onnx.helper.make_tensor_type_proto(t.data_type, t.dims) for t in graph.initializer}
