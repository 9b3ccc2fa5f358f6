"""Models from torch.export archives: what the rest of asapc needs to know of their programs."""

import inspect
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo

from asapc.errors import CheckpointError
from asapc.hashes import sha256
from asapc.loading.pt2.archive import ANEW, read_archive
from asapc.loading.samples import as_samples
from asapc.loading.untrusted.tensors import damage
from asapc.loading.weights import check_finite
from asapc.types.model import InputType, LoadedModel
from asapc.types.samples import Samples

# Elements of a tensor in a graph, for one sample. A graph may ask for any size, whatever that of its file.
MAX_SIZE = 2**32
# Position of the argument that says whether a layer is trained.
TRAINED = {
    "aten.dropout.default": 2,
    "aten.native_dropout.default": 2,
    "aten.batch_norm.default": 5,
    "aten._native_batch_norm_legit_functional.default": 5,
}


def load_program(path: Path) -> LoadedModel:
    """Read a .pt2 archive as a model.

    Raises:
        CheckpointError: it cannot be read safely, was exported in training mode or with a fixed batch, or takes
            anything but tensors by position.
    """
    program, sample = read_archive(path)
    with damage(path, CheckpointError):
        check_graph(path, program)
        module = program.module()
        inputs = batch_inputs(path, program, module)
        # A single NaN among constants may be meant, to compare or to fill with; one among buffers is none of these.
        constants = [(n, v) for n, v in program.constants.items() if isinstance(v, Tensor) and v.numel() > 1]
        check_finite(path, program.named_parameters(), [*program.named_buffers(), *constants])
        example = sample_inputs(path, list(inputs), sample)
    return LoadedModel(
        module=module,
        path=path,
        sha256=sha256(path),
        parameters=sum(value.numel() for value in program.parameters()),
        calibration=None,
        held_out=None,
        program=program,
        inputs=inputs,
        example=example,
        notes=("torch.export archive with sample inputs" if example else "torch.export archive",),
        format="exported",
    )


def check_graph(path: Path, program: ExportedProgram) -> None:
    """Raise CheckpointError if a graph was captured in training mode, or asks for more memory than there can be."""
    for node in program.graph.nodes:
        place = TRAINED.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise CheckpointError(f"{path} was exported in training mode: it has {node.target}", ANEW)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and prod(size for size in value.shape if isinstance(size, int)) > MAX_SIZE:
            raise CheckpointError(f"{path}: {node.name} is {tuple(value.shape)}, more than fits into memory", ANEW)


def sample_inputs(path: Path, names: list[str], sample: Any) -> Samples | None:
    """The sample inputs of an archive, None where it has none that can be used.

    Args:
        path: the archive, for messages.
        names: of the program's inputs.
        sample: what the archive holds: (args, kwargs).
    """
    values = sample[0] if isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], tuple) else ()
    if len(values) != len(names) or not all(isinstance(value, Tensor) and value.dim() for value in values):
        return None
    found = as_samples({"inputs": dict(zip(names, values, strict=True))}, f"sample inputs of {path}")
    return found if len(found) > 1 else None


def batch_inputs(path: Path, program: ExportedProgram, module: torch.nn.Module) -> dict[str, InputType]:
    """The inputs of a program by name: tensors by position, all with one dynamic batch in front.

    Raises:
        CheckpointError: they are not.
    """
    arguments, keywords = program.call_spec.in_spec.children()
    wanted = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    by_position = not keywords.num_children and all(child.is_leaf() for child in arguments.children())
    if not by_position or not inputs or len(inputs) != arguments.num_children:
        raise CheckpointError(f"{path} takes something other than tensors by position", "export it with such inputs")
    hint = 'export it with dynamic_shapes={"NAME": {0: Dim("batch")}, ...}, for every input and without a maximum'
    batches: set[Any] = set()
    for node in inputs:
        value = node.meta["val"]
        if not isinstance(value, Tensor) or not value.dim():
            raise CheckpointError(f"{path}: its input {node.name} is no tensor with a batch in front", hint)
        if not isinstance(value.shape[0], torch.SymInt):
            raise CheckpointError(f"{path} was exported with a fixed batch: {node.name} is {tuple(value.shape)}", hint)
        batches.add(value.shape[0].node.expr)
    limits = program.range_constraints.get(next(iter(batches)))
    if len(batches) > 1 or limits is None or limits.lower > 2 or limits.upper != int_oo:
        raise CheckpointError(f"{path} does not take batches of every size, one for all inputs", hint)
    values = [node.meta["val"] for node in inputs]
    kinds = [InputType(tuple(n if isinstance(n, int) else None for n in v.shape), v.dtype) for v in values]
    return dict(zip(inspect.signature(module.forward).parameters, kinds, strict=True))
