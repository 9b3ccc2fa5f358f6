"""Loads models from torch.export archives, with what the rest of asapc needs to know about their programs."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._sympy.numbers import int_oo

from asapc.errors import CheckpointError
from asapc.loading.pt2.archive import ANEW, read_archive
from asapc.loading.samples import as_samples
from asapc.loading.untrusted.demand import Demand
from asapc.loading.untrusted.source import Source
from asapc.loading.weights import check_finite
from asapc.types.model import InputType, LoadedModel
from asapc.types.samples import Samples

# Elements of a tensor in a graph, for one sample. A graph may ask for any size, however small its file.
MAX_SIZE = 2**32
# Position of the argument that says whether a layer is trained.
TRAINED = {
    "aten.dropout.default": 2,
    "aten.native_dropout.default": 2,
    "aten.batch_norm.default": 5,
    "aten._native_batch_norm_legit_functional.default": 5,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ExportedModel(LoadedModel):
    """A model from a torch.export archive.

    Attributes:
        program: its graph, free of writes in place.
        inputs: what it takes, by name and in its order.
    """

    program: ExportedProgram
    inputs: Mapping[str, InputType]


def load_program(source: Source) -> ExportedModel:
    """Load a .pt2 archive as a model.

    Raises:
        CheckpointError: it cannot be read safely, was exported in training mode or with a fixed batch, or takes
            anything but tensors by position.
    """
    program, sample = read_archive(source)
    with source.reading():
        check_graph(source, program)
        module = program.module()
        inputs = batch_inputs(source, program, module)
        # A constant that is one NaN may be meant, to compare or to fill with; a NaN in a buffer never is.
        constants = [(n, v) for n, v in program.constants.items() if isinstance(v, Tensor) and v.numel() > 1]
        check_finite(source, program.named_parameters(), [*program.named_buffers(), *constants])
        example = sample_inputs(source, list(inputs), sample)
    return ExportedModel(
        module=module,
        path=source.path,
        sha256=source.sha256,
        parameters=sum(value.numel() for value in program.parameters()),
        calibration=None,
        held_out=None,
        program=program,
        inputs=inputs,
        example=example,
        notes=("torch.export archive with sample inputs" if example else "torch.export archive",),
    )


def check_graph(source: Source, program: ExportedProgram) -> None:
    """Raise CheckpointError if a graph was captured in training mode, or asks for more memory than there can be."""
    demand, inputs = Demand(source), set(program.graph_signature.user_inputs)
    varying: set[Node] = set()  # what depends on the inputs
    for node in program.graph.nodes:
        place = TRAINED.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise CheckpointError(f"{source} was exported in training mode: it has {node.target}", ANEW)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and prod(size for size in value.shape if isinstance(size, int)) > MAX_SIZE:
            raise CheckpointError(f"{source}: {node.name} is {tuple(value.shape)}, more than fits into memory", ANEW)
        if node.name in inputs or not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
        elif node.op == "call_function":
            for item in value if isinstance(value, tuple | list) else [value]:
                demand.add_constant(item.numel() * item.itemsize if isinstance(item, Tensor) else 0)


def sample_inputs(source: Source, names: list[str], sample: Any) -> Samples | None:
    """Return the sample inputs of an archive, None where it has none that can be used.

    Args:
        source: the archive, for messages.
        names: of the program's inputs.
        sample: (args, kwargs) as the archive holds them.
    """
    values = sample[0] if isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], tuple) else ()
    if len(values) != len(names) or not all(isinstance(value, Tensor) and value.dim() for value in values):
        return None
    samples = as_samples({"inputs": dict(zip(names, values, strict=True))}, f"sample inputs of {source}")
    return samples if len(samples) > 1 else None


def batch_inputs(source: Source, program: ExportedProgram, module: torch.nn.Module) -> dict[str, InputType]:
    """Return the inputs of a program by name: tensors by position, all with one dynamic batch in front.

    Raises:
        CheckpointError: they are something else.
    """
    inputs = input_nodes(source, program)
    hint = 'export it with dynamic_shapes={"NAME": {0: Dim("batch")}, ...}, for every input and without a maximum'
    for node in inputs:
        check_batch(source, node, hint)
    values = [node.meta["val"] for node in inputs]
    batches = {value.shape[0].node.expr for value in values}
    limits = program.range_constraints.get(next(iter(batches)))
    if len(batches) > 1 or limits is None or limits.lower > 2 or limits.upper != int_oo:
        raise CheckpointError(f"{source} does not take batches of every size, one for all inputs", hint)
    kinds = [InputType(tuple(n if isinstance(n, int) else None for n in v.shape), v.dtype) for v in values]
    return dict(zip(inspect.signature(module.forward).parameters, kinds, strict=True))


def input_nodes(source: Source, program: ExportedProgram) -> list[Node]:
    """Return the nodes of a program's inputs; raise CheckpointError unless all are tensors by position."""
    arguments, keywords = program.call_spec.in_spec.children()
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    by_position = not keywords.num_children and all(child.is_leaf() for child in arguments.children())
    if not by_position or not inputs or len(inputs) != arguments.num_children:
        raise CheckpointError(f"{source} takes something other than tensors by position", "export it with such inputs")
    return inputs


def check_batch(source: Source, node: Node, hint: str) -> None:
    """Raise CheckpointError unless an input is a tensor with a dynamic batch in front."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not value.dim():
        raise CheckpointError(f"{source}: its input {node.name} is not a tensor with the batch in front", hint)
    if not isinstance(value.shape[0], torch.SymInt):
        raise CheckpointError(f"{source} was exported with a fixed batch: {node.name} is {tuple(value.shape)}", hint)
