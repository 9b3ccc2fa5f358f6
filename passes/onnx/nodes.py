"""What is known of the nodes and values of an ONNX model, and nodes that take another's place."""

from typing import Any


def types_of(program: Any) -> dict[str, Any]:
    """Return the types of a ModelProto's inputs, constants, and of what is computed of them, as TypeProtos by name."""
    import onnx

    graph = program.graph
    inferred = onnx.shape_inference.infer_shapes(program, data_prop=True).graph
    types = {value.name: value.type for value in (*graph.input, *inferred.value_info, *graph.output)}
    return types | {t.name: onnx.helper.make_tensor_type_proto(t.data_type, t.dims) for t in graph.initializer}


def opset_of(program: Any) -> int:
    """Return the version of the ONNX standard that a ModelProto is of."""
    return int(next(o.version for o in program.opset_import if o.domain in ("", "ai.onnx")))


def attributes_of(node: Any) -> dict[str, Any]:
    """Return the attributes of a node, by name."""
    from onnx.helper import get_attribute_value

    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}


class Parts:
    """Nodes that take the place of one, called NODE/PART as what they give is.

    Attributes:
        nodes: in their order; the last gives what the node gave, once `in_place` was called.
    """

    def __init__(self, node: Any) -> None:
        self.node, self.owner = node, node.name or node.output[0]
        self.nodes: list[Any] = []

    def add(self, kind: str, inputs: list[str], part: str, **attributes: Any) -> str:
        """Add a node, and return the name of what it gives."""
        from onnx.helper import make_node

        name = f"{self.owner}/{part}"
        self.nodes.append(make_node(kind, inputs, [name], name, **attributes))
        return name

    def in_place(self) -> list[Any]:
        """Return the nodes, the last of which gives what the node gave."""
        self.nodes[-1].output[0] = self.node.output[0]
        return self.nodes
