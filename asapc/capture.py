"""Captures a model as one graph: the only place that calls torch.export."""

import warnings
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_structure

from asapc.artifacts import BATCH_AXIS, CapturedGraph, DynamicAxis, EarlyStops, LoadedModel, Samples
from asapc.config import EarlyStopRule
from asapc.early_stop import Unconverged
from asapc.errors import AsapcError, CaptureError, SamplesError, first_line
from asapc.inputs import arguments, order_inputs
from asapc.onnx_graph import check_memory, unmark
from asapc.onnx_import import OnnxModule

aten = torch.ops.aten
# Batch of the example. Two or more, since an example of one is made a constant without a word
# (pytorch issue 151582).
EXAMPLE_BATCH = 2
# Batch in which a model and its graph are compared.
COMPARED_BATCH = 32
# Relative, above what another order of the same operations costs in float32.
ROUNDING = 1e-6
# Where functions that a graph applies to sizes, and to tuples of tensors, come from.
OF_SIZES = ("_operator", "math", "torch")
# Composite operators that passes know as they are; casts are not among them, since the probe leaves them out.
KEPT = {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.chunk.default, aten.mT.default}
# Relative to what a model and its graph differ by for several samples, and beyond rounding: with short floats, or
# random numbers in the forward, they always differ.
SINGLE_RATIO, SINGLE_ROUNDING = 10, 1e-3


def capture(
    loaded: LoadedModel,
    samples: Samples,
    early_stop: EarlyStopRule = "bound",
    axes: Mapping[str, Mapping[int, DynamicAxis]] | None = None,
) -> CapturedGraph:
    """Export a model with a dynamic batch axis.

    Args:
        loaded: the model.
        samples: two samples or more, named as the parameters of its forward. A model that stops early is compared
            with its graph on all of them.
        early_stop: what to do where loops that stop early for these samples are captured at their bound, and the
            outputs are other ones: "bound" goes on, "refuse" does not.
        axes: open axes by the input's name and their number; None for the batch alone.

    Raises:
        SamplesError: the samples' names are not those of the model's inputs, or the model refuses them.
        CaptureError: the model has control flow that cannot be captured, returns more than tensors, does something
            else for a batch of one, or stops early though that is to be refused.
    """
    samples = order_inputs(loaded, samples)
    example = samples[:EXAMPLE_BATCH]
    if isinstance(loaded.module, OnnxModule):
        check_memory(loaded.module, example)
    run(loaded.module, example, samples)
    if loaded.program is not None:
        return CapturedGraph(loaded.program, example)
    if isinstance(loaded.module, OnnxModule):
        graph = unmark(export(loaded.module, example.inputs), example, loaded.module)
        check_single(loaded.module, graph.program, example)
        return graph
    with Unconverged(loaded.module) as unconverged:
        program = export(loaded.module, example.inputs, axes)
    check_single(loaded.module, program, example, stops=bool(unconverged.questions))
    if not unconverged.questions:
        return CapturedGraph(program, example, axes=axes)
    # What was only computed to be asked about is of no use any more.
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()
    stops = compare_stops(loaded.module, program, samples, unconverged.questions)
    if stops.taken and early_stop == "refuse":
        raise CaptureError(
            f"the loop at {', '.join(stops.questions)} stops early on the samples given; taken to its bound the "
            f"outputs differ by {stops.difference:.1e}",
            "compile it with --early-stop bound, or train and evaluate it with a fixed number of iterations",
        )
    return CapturedGraph(program, example, stops, axes)


def run(module: nn.Module, batch: Samples, samples: Samples) -> list[Tensor]:
    """All floating outputs of a model for one batch of the samples, in float64.

    Raises:
        SamplesError: the model refuses them.
        CaptureError: it returns more than tensors.
    """
    try:
        args, kwargs = arguments(module, batch.inputs)
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except AsapcError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in samples.inputs.items())
        raise SamplesError(
            f"the model does not run on these samples ({shapes}): {first_line(error)}",
            "give samples of the shape and dtype that the model was trained on",
        ) from error
    check_outputs(outputs)
    leaves = tree_leaves(outputs)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_outputs(outputs: Any) -> None:
    """Raise CaptureError where a model returns anything but tensors; None in their place is left out."""
    leaves = [(path, leaf) for path, leaf in tree_flatten_with_path(outputs)[0] if leaf is not None]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            where = f"{keystr(path)} of its outputs is" if path else "what it returns is"
            raise CaptureError(
                f"a graph gives tensors alone, and the model more: {where} of type {type(leaf).__name__}",
                "leave it out of what the forward returns, or return None in its place",
            )
    if not leaves:
        raise CaptureError("the model returns nothing", "return the tensors that are wanted from the forward")


def check_single(module: nn.Module, program: ExportedProgram, example: Samples, stops: bool = False) -> None:
    """Raise CaptureError where a graph does not do for a batch of one what the model does.

    Code may treat it apart, as `squeeze()` does; a graph was captured with several samples and has but one way.

    Args:
        module: the model.
        program: its graph.
        example: what it was captured with.
        stops: whether the model stops early: the graph then gives other numbers anyway, and only shapes can be held
            against each other.
    """
    hint = "let the forward treat a batch of one as any other; squeeze() without a dimension, for one, does not"
    captured, differences, axes = program.module(), [], []
    for batch in (example, example[:1]):
        try:
            expected, seen = run(module, batch, batch), run(captured, batch, batch)
        except SamplesError as error:
            raise CaptureError(f"at batch {len(batch)} {error}", hint) from error
        shapes = [", ".join(str(tuple(value.shape)) for value in values) for values in (expected, seen)]
        if shapes[0] != shapes[1]:
            raise CaptureError(f"at batch {len(batch)} the model gives {shapes[0]}, and its graph {shapes[1]}", hint)
        axes.append([value.dim() for value in expected])
        error_square, norm = squares(expected, seen)
        differences.append((error_square / (norm or 1.0)) ** 0.5)
    if axes[0] != axes[1]:
        raise CaptureError(f"at batch 1 the model's outputs have {axes[1]} axes, at batch 2 {axes[0]}", hint)
    several, single = differences
    if not stops and single > SINGLE_RATIO * several + SINGLE_ROUNDING:
        raise CaptureError(
            f"for a batch of one the graph differs from the model by {single:.1e}, for {len(example)} samples by "
            f"{several:.1e}",
            hint,
        )


def squares(expected: Sequence[Tensor], seen: Sequence[Tensor]) -> tuple[float, float]:
    """Sums of squares over some outputs: of what they differ by, infinite where only one is finite, and of their own.

    Equal infinities, as in masked scores, and NaN in the same places are no difference.
    """
    error = norm = 0.0
    for reference, candidate in zip(expected, seen, strict=True):
        same = (candidate == reference) | (candidate.isnan() & reference.isnan())
        error += torch.where(same, 0.0, candidate - reference).square().nan_to_num(nan=inf, posinf=inf).sum().item()
        norm += torch.where(reference.isfinite(), reference, 0.0).square().sum().item()
    return error, norm


def compare_stops(
    module: nn.Module, program: ExportedProgram, samples: Samples, questions: Mapping[str, str]
) -> EarlyStops:
    """Say what doing without early stops changes: the outputs of a model against those of its graph.

    Raises:
        CaptureError: the graph gives NaN or infinity where the model does not, or the other way round.
    """
    captured = program.module()
    error = norm = 0.0
    for batch in samples.batches(COMPARED_BATCH):
        more = squares(run(module, batch, samples), run(captured, batch, samples))
        error, norm = error + more[0], norm + more[1]
    if not isfinite(error):
        raise CaptureError(
            f"with and without the early stop at {', '.join(questions)} the model gives NaN or infinity for different "
            "samples",
            "bound the loop such that it is stable to the end, and do not use numbers read from tensors but to stop",
        )
    difference = (error / (norm or 1.0)) ** 0.5
    return EarlyStops(questions, difference, difference > ROUNDING)


def export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, DynamicAxis]] | None = None,
    dims: tuple[dict[int, Any], ...] | None = None,
) -> ExportedProgram:
    """torch.export with the first axis of every input dynamic and called "batch", or with dynamic axes of one's own.

    Inputs reach the parameters of their names. The program's graph, and its module, take them by position, in the
    order given.

    Args:
        module: the model.
        inputs: example inputs.
        axes: open axes by the input's name and their number; None for the batch alone.
        dims: dynamic shapes as torch.export takes them, in place of `axes`.
    """
    open_axes = {name: {0: BATCH_AXIS} for name in inputs} if axes is None else axes
    known = {axis.name: axis for of_input in open_axes.values() for axis in of_input.values()}
    symbols = {name: Dim(name, min=axis.low, max=axis.high) for name, axis in known.items()}
    own = tuple({number: symbols[axis.name] for number, axis in open_axes[name].items()} for name in inputs)
    args, kwargs = arguments(module, inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: ExportedProgram = torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=own if dims is None else dims,
                strict=False,
            )
            # Decomposes nothing, but turns writes in place into ordinary operations: a loop that divides its
            # plan in place would otherwise outlive the rewrite, since such nodes never count as dead. And regions with
            # automatic casts, without gradients or under vmap into plain nodes. It takes as long as the export itself.
            if is_plain(program):
                program.graph.eliminate_dead_code()
                program.graph_module.recompile()
            else:
                program = program.run_decompositions({})
            if kwargs:
                by_position(program, inputs)
    except AsapcError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture the model: {first_line(error)}",
            "the forward must work for every batch size, and for every length of a dynamic axis, and may branch on "
            "values of tensors to end a loop only",
        ) from error
    return program


def is_plain(program: ExportedProgram) -> bool:
    """Whether another pass would change nothing that counts: no writes, regions, or views that it would name anew."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return all(
        not target._schema.is_mutable and (not _is_cia_op(target) or _is_preservable_cia_op(target) or target in KEPT)
        if isinstance(target, OpOverload)
        else target.__module__ in OF_SIZES
        for target in targets
    )


def by_position(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> None:
    """Let a program that was exported with keyword arguments take them by position, as its graph does."""
    signature = program.module_call_graph[0].signature
    assert signature is not None  # the first is that of the whole program
    example: tuple[tuple[Tensor, ...], dict[str, Tensor]] = (tuple(inputs.values()), {})
    signature.in_spec = tree_structure(example)
    program.example_inputs = example
