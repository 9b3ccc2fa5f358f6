"""Replaces the loops of an ONNX file by operators, and leaves everything else of the file as it is."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asapc.passes.base import GraphPass, PassResult, PostconditionError, PreconditionError


@dataclass(frozen=True, eq=False)
class Piece:
    """The operator that replaces one loop.

    Attributes:
        name: of the site; every new name begins with it.
        model: a ModelProto of the operator alone, of the file's opset.
        inputs: the file's values that it reads, in the order of its inputs.
        outputs: the file's values that it computes, in the order of its outputs.
    """

    name: str
    model: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """What the names of its nodes and values begin with."""
        return f"asapc/{self.name}/"


class SpliceOnnx(GraphPass[Any]):
    """Replaces the nodes that compute some values of an ONNX model by operators.

    Nodes that nothing needs any more are dropped, with the constants that only they read. Nodes that were unused before
    stay. All others keep their bytes and their order.

    Args:
        pieces: the operators.
        metadata: entries to add to the model's own.
        sizes: for each input, sizes of its axes that the operators fix, by the axis.
    """

    def __init__(
        self, pieces: Sequence[Piece], metadata: Mapping[str, str], sizes: Mapping[str, Mapping[int, int]]
    ) -> None:
        self.pieces, self.metadata, self.sizes = tuple(pieces), dict(metadata), sizes

    def requires(self, program: Any) -> None:
        """Check that the model has the values that the pieces read and compute, or the pieces themselves."""
        values = set(outputs_of(program.graph.node)) | {v.name for v in program.graph.input}
        values |= {tensor.name for tensor in program.graph.initializer}
        for piece in self.pieces:
            if not ({*piece.inputs, *piece.outputs} <= values):
                raise PreconditionError(f"the values of site {piece.name} are not in this model")

    def call(self, program: Any) -> PassResult[Any]:
        """Replace what has not been replaced yet, in a copy of the model."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(program)
        names = [node.name for node in model.graph.node]
        pieces = [piece for piece in self.pieces if not any(name.startswith(piece.prefix) for name in names)]
        if pieces:
            splice(model.graph, pieces)
        fix_sizes(model.graph, self.sizes)
        add_metadata(model, self.metadata)
        modified = model.SerializeToString(deterministic=True) != program.SerializeToString(deterministic=True)
        return PassResult(model, modified)

    def ensures(self, program: Any) -> None:
        """Check the model with ONNX's own checker: nodes are in topological order, and one node computes each value."""
        import onnx

        try:
            onnx.checker.check_model(program)
        except onnx.checker.ValidationError as error:
            raise PostconditionError(f"onnx.checker refuses the model: {error}") from error


def splice(graph: Any, pieces: Sequence[Piece]) -> None:
    """Put pieces into a graph, where the values that they compute came from, and drop what has become useless."""
    before = list(graph.node)
    outputs = {value.name for value in graph.output}
    after = drop_orphans(insert(before, pieces), before, outputs)
    for piece in pieces:
        add_constants(graph, piece)
    unread = set(reads(before)) - set(reads(after)) - outputs
    replace_all(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in unread])
    unmade = set(outputs_of(before)) - set(outputs_of(after))
    replace_all(graph.value_info, [value for value in graph.value_info if value.name not in unmade])
    replace_all(graph.node, after)


def insert(nodes: Iterable[Any], pieces: Sequence[Piece]) -> list[Any]:
    """Return the nodes with the pieces among them, and without those that computed the same values."""
    makers = {output: piece for piece in pieces for output in piece.outputs}
    after: list[Any] = []
    inside: set[str] = set()  # names of the pieces already inserted
    for node in nodes:
        # All that a piece reads is computed before the first value that the piece computes.
        for piece in (makers[output] for output in node.output if output in makers):
            if piece.name not in inside:
                inside.add(piece.name)
                after += renamed(piece)
        after += retire(node, makers)
    return after


def retire(node: Any, makers: Container[str]) -> list[Any]:
    """Return what stays of a node when pieces compute some of its outputs: nothing if they compute all, else a node."""
    outputs = list(outputs_of([node]))
    others = [output for output in outputs if output not in makers]
    if others == outputs:
        return [node]
    if not others:
        return []
    copy = type(node)()
    copy.CopyFrom(node)
    for i, name in enumerate(copy.output):
        if name in makers:
            copy.output[i] = f"{name}/replaced"  # an output that nobody reads any more
    return [copy]


def drop_orphans(nodes: Sequence[Any], before: Sequence[Any], outputs: Collection[str]) -> list[Any]:
    """Return the nodes without those that nothing needs any more.

    Args:
        nodes: with the pieces among them, in topological order.
        before: the same without the pieces.
        outputs: names of the graph's outputs.
    """
    live_before, live_after = live(before, outputs), live(nodes, outputs)
    lost = set(outputs_of(before)) - set(outputs_of(nodes))  # values that nothing computes any more
    after: list[Any] = []
    for node in nodes:
        # A node that was unused before stays, unless it reads a value that is gone.
        orphan = id(node) in live_before or lost & set(reads([node]))
        if orphan and id(node) not in live_after:
            lost |= set(node.output)
        else:
            after.append(node)
    return after


def add_constants(graph: Any, piece: Piece) -> None:
    """Add a piece's constants to a graph, under names that nothing else in the file has."""
    for tensor in piece.model.graph.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = piece.prefix + tensor.name


def fix_sizes(graph: Any, sizes: Mapping[str, Mapping[int, int]]) -> None:
    """Set sizes of axes of a graph's inputs, by the input and the axis."""
    for value in graph.input:
        for axis, size in sizes.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_value = size


def add_metadata(model: Any, metadata: Mapping[str, str]) -> None:
    """Set entries of a model's metadata; its others stay."""
    import onnx

    others = [entry for entry in model.metadata_props if entry.key not in metadata]
    entries = [onnx.StringStringEntryProto(key=key, value=value) for key, value in metadata.items()]
    replace_all(model.metadata_props, [*others, *entries])


def renamed(piece: Piece) -> Iterator[Any]:
    """Yield the nodes of a piece, with names that nothing else in the file has."""
    graph = piece.model.graph
    names = {value.name: name for value, name in zip(graph.input, piece.inputs, strict=True)}
    names |= {value.name: name for value, name in zip(graph.output, piece.outputs, strict=True)}
    for index, node in enumerate(graph.node):
        copy = type(node)()
        copy.CopyFrom(node)
        copy.name = f"{piece.prefix}{node.name or index}"
        for field in (copy.input, copy.output):
            for i, name in enumerate(field):
                field[i] = names.get(name, piece.prefix + name) if name else ""
        yield copy


def live(nodes: Sequence[Any], outputs: Iterable[str]) -> set[int]:
    """Return the ids of the nodes that some values depend on."""
    needed, ids = set(outputs), set()
    for node in reversed(nodes):
        if needed & set(outputs_of([node])):
            ids.add(id(node))
            needed |= set(reads([node]))
    return ids


def reads(nodes: Iterable[Any]) -> Iterator[str]:
    """Yield the names that nodes read, in their inner graphs too."""
    for node in nodes:
        yield from (name for name in node.input if name)
        for inner in inner_graphs(node):
            yield from reads(inner.node)
            yield from (value.name for value in inner.output)


def inner_graphs(node: Any) -> Iterator[Any]:
    """Yield the graphs that a node holds: branches, or the body of a loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def outputs_of(nodes: Iterable[Any]) -> Iterator[str]:
    """Return the names of the values that nodes compute."""
    return (name for node in nodes for name in node.output if name)


def replace_all(field: Any, items: Sequence[Any]) -> None:
    """Replace the content of a repeated field by messages, which may come from the field itself."""
    copies = []
    for item in items:
        copy = type(item)()
        copy.CopyFrom(item)
        copies.append(copy)
    del field[:]  # only now, since it may hold the items
    field.extend(copies)
