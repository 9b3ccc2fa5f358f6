"""Puts operators into an ONNX file in the place of its loops, and leaves everything else of the file as it is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asapc.passes.base import GraphPass, PassResult, PostconditionError, PreconditionError


@dataclass(frozen=True, eq=False)
class Piece:
    """What comes in the place of one loop.

    Attributes:
        name: of the site; every name that comes in begins with it.
        model: a ModelProto of the operator alone, of the file's opset.
        inputs: the file's values that it reads, in the order of its inputs.
        outputs: the file's values that it gives, in the order of its outputs.
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
    """Replaces what makes some values of an ONNX model by operators.

    Nodes that nothing needs any more go, and the constants that only they read; those that were of no use before stay.
    All others keep their bytes and their order.

    Args:
        pieces: the operators.
        metadata: what the model is to say about itself besides what it says already.
        sizes: for each input, sizes of its axes that the operators fix, by the axis.
    """

    def __init__(
        self, pieces: Sequence[Piece], metadata: Mapping[str, str], sizes: Mapping[str, Mapping[int, int]]
    ) -> None:
        self.pieces, self.metadata, self.sizes = tuple(pieces), dict(metadata), sizes

    def requires(self, program: Any) -> None:
        """The model has the values that the pieces read and give, or the pieces themselves."""
        values = set(outputs_of(program.graph.node)) | {v.name for v in program.graph.input}
        values |= {tensor.name for tensor in program.graph.initializer}
        for piece in self.pieces:
            if not ({*piece.inputs, *piece.outputs} <= values):
                raise PreconditionError(f"the values of site {piece.name} are not in this model")

    def call(self, program: Any) -> PassResult[Any]:
        """Replace what is still to replace, in a copy of the model."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(program)
        names = {node.name for node in model.graph.node}
        pieces = [piece for piece in self.pieces if not any(name.startswith(piece.prefix) for name in names)]
        if pieces:
            splice(model.graph, pieces)
        for value in model.graph.input:
            for axis, size in self.sizes.get(value.name, {}).items():
                value.type.tensor_type.shape.dim[axis].dim_value = size
        kept = [entry for entry in model.metadata_props if entry.key not in self.metadata]
        added = [onnx.StringStringEntryProto(key=key, value=value) for key, value in self.metadata.items()]
        replace_all(model.metadata_props, [*kept, *added])
        modified = model.SerializeToString(deterministic=True) != program.SerializeToString(deterministic=True)
        return PassResult(model, modified)

    def ensures(self, program: Any) -> None:
        """The model passes ONNX's own checker, which asks for topological order and for one maker of each value."""
        import onnx

        try:
            onnx.checker.check_model(program)
        except onnx.checker.ValidationError as error:
            raise PostconditionError(f"onnx.checker refuses the model: {error}") from error


def splice(graph: Any, pieces: Sequence[Piece]) -> None:
    """Put pieces into a graph, where the values that they give were made, and drop what has become useless."""
    before = list(graph.node)
    needed = live(before, [value.name for value in graph.output])
    given = {output: piece for piece in pieces for output in piece.outputs}
    after: list[Any] = []
    put: set[str] = set()
    for node in before:
        mine = [output for output in node.output if output in given]
        for piece in (given[output] for output in mine):
            if piece.name not in put:  # all that it reads was made before the first value that it gives
                put.add(piece.name)
                after += renamed(piece)
        if mine and set(mine) != {output for output in node.output if output}:
            node = retired(node, mine)
        elif mine:
            continue
        after.append(node)
    for piece in pieces:
        for tensor in piece.model.graph.initializer:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = piece.prefix + tensor.name
    still = live(after, [value.name for value in graph.output])
    gone = {id(node) for node in after if id(node) in needed and id(node) not in still}
    # What was useless before and reads what goes now has to go with it.
    lost: set[str] = set()
    for node in after:
        if id(node) in gone or (id(node) not in still and lost & set(reads([node]))):
            gone.add(id(node))
            lost |= set(node.output)
    kept = [node for node in after if id(node) not in gone]
    read = set(reads(kept)) | {value.name for value in graph.output}
    unused = set(reads(before)) - read
    replace_all(graph.initializer, [t for t in graph.initializer if t.name not in unused])
    there = set(outputs_of(kept))
    lost = set(outputs_of(before)) - there
    replace_all(graph.value_info, [v for v in graph.value_info if v.name not in lost])
    replace_all(graph.node, kept)


def renamed(piece: Piece) -> Iterator[Any]:
    """The nodes of a piece, with names that nothing else in the file has."""
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


def retired(node: Any, mine: Iterable[str]) -> Any:
    """A node with several outputs that gives some of them to nobody any more."""
    copy = type(node)()
    copy.CopyFrom(node)
    for i, name in enumerate(copy.output):
        if name in mine:
            copy.output[i] = f"{name}/replaced"
    return copy


def live(nodes: Sequence[Any], outputs: Iterable[str]) -> set[int]:
    """Ids of the nodes that some values depend on."""
    wanted, found = set(outputs), set()
    for node in reversed(nodes):
        if wanted & {output for output in node.output if output}:
            found.add(id(node))
            wanted |= set(reads([node]))
    return found


def reads(nodes: Iterable[Any]) -> Iterator[str]:
    """Names that nodes read, those in their inner graphs too."""
    for node in nodes:
        yield from (name for name in node.input if name)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from reads(inner.node)
                yield from (value.name for value in inner.output)


def outputs_of(nodes: Iterable[Any]) -> Iterator[str]:
    """Names that nodes make."""
    return (name for node in nodes for name in node.output if name)


def replace_all(field: Any, items: Sequence[Any]) -> None:
    """Give a repeated field new content, made of messages that may be its own."""
    copies = []
    for item in items:
        copy = type(item)()
        copy.CopyFrom(item)
        copies.append(copy)
    del field[:]
    field.extend(copies)
