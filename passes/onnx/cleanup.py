"""Makes an exported ONNX model fit for shipping: states its origin, and leaves no trace of the exporting machine."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asapc.passes.base import GraphPass, PassResult, PostconditionError

if TYPE_CHECKING:
    from onnx import ModelProto


class OnnxCleanup(GraphPass["ModelProto"]):
    """Drops doc strings and metadata that the exporter left on nodes and values, and states the origin.

    The exporter writes the stack trace of every node into the file, with paths of the user's machine. These are
    private, and make equal models differ.

    Args:
        metadata: entries that describe the model, e.g. the compiler's version.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.metadata = dict(metadata)

    def call(self, program: "ModelProto") -> "PassResult[ModelProto]":
        """Clean a copy of the model."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(program)
        model.ClearField("doc_string")
        for graph in (model.graph, *model.functions):
            clean(graph)
        onnx.helper.set_model_props(model, self.metadata)
        modified = model.SerializeToString(deterministic=True) != program.SerializeToString(deterministic=True)
        return PassResult(model, modified)

    def ensures(self, program: "ModelProto") -> None:
        """Check that the model passes ONNX's own checker, shapes included."""
        import onnx

        try:
            onnx.checker.check_model(program, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise PostconditionError(f"onnx.checker refuses the model: {error}") from error


def clean(item: Any) -> None:
    """Drop doc strings and metadata of a graph or function, of all it holds, and of subgraphs, in place."""
    for field in ("doc_string", "metadata_props"):
        if field in item.DESCRIPTOR.fields_by_name:
            item.ClearField(field)
    for descriptor, value in item.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE and descriptor.name not in ("raw_data", "type"):
            for inner in value if descriptor.is_repeated else [value]:
                clean(inner)
