"""Captures a model as one graph: the only place that calls torch.export."""

import warnings
from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_structure

from asapc.artifacts import CapturedGraph, EarlyStops, LoadedModel, Samples
from asapc.config import EarlyStopRule
from asapc.early_stop import Unconverged
from asapc.errors import AsapcError, CaptureError, SamplesError, first_line
from asapc.inputs import arguments, order_inputs
from asapc.onnx_graph import check_memory, unmark
from asapc.onnx_import import OnnxModule

# Batch of the example. Two or more, since an example of one is made a constant without a word
# (pytorch issue 151582).
EXAMPLE_BATCH = 2
# Batch in which a model and its graph are compared.
COMPARED_BATCH = 32
# Relative, above what another order of the same operations costs in float32.
ROUNDING = 1e-6


def capture(loaded: LoadedModel, samples: Samples, early_stop: EarlyStopRule = "bound") -> CapturedGraph:
    """Export a model with a dynamic batch axis.

    Args:
        loaded: the model.
        samples: two samples or more, named as the parameters of its forward. A model that stops early is compared
            with its graph on all of them.
        early_stop: what to do where loops that stop early for these samples are captured at their bound, and the
            outputs are other ones: "bound" goes on, "refuse" does not.

    Raises:
        SamplesError: the samples' names are not those of the model's inputs, or the model refuses them.
        CaptureError: the model has control flow that cannot be captured, fixes the batch, or stops early though
            that is to be refused.
    """
    samples = order_inputs(loaded, samples)
    example = samples[:EXAMPLE_BATCH]
    if isinstance(loaded.module, OnnxModule):
        check_memory(loaded.module, example)
    run(loaded.module, example, samples)
    if loaded.program is not None:
        return CapturedGraph(loaded.program, example)
    if isinstance(loaded.module, OnnxModule):
        return unmark(export(loaded.module, example.inputs), example, loaded.module)
    with Unconverged(loaded.module) as unconverged:
        program = export(loaded.module, example.inputs)
    if not unconverged.questions:
        return CapturedGraph(program, example)
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
    return CapturedGraph(program, example, stops)


def run(module: nn.Module, batch: Samples, samples: Samples) -> list[Tensor]:
    """All floating outputs of a model for one batch of the samples, in float64.

    Raises:
        SamplesError: the model refuses them.
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
    leaves = tree_leaves(outputs)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


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
        for expected, seen in zip(run(module, batch, samples), run(captured, batch, samples), strict=True):
            # Equal infinities, as in masked scores, and NaN in the same places are no difference.
            same = (seen == expected) | (seen.isnan() & expected.isnan())
            error += torch.where(same, 0.0, seen - expected).square().sum().item()
            norm += torch.where(expected.isfinite(), expected, 0.0).square().sum().item()
    if not isfinite(error):
        raise CaptureError(
            f"with and without the early stop at {', '.join(questions)} the model gives NaN or infinity for different "
            "samples",
            "bound the loop such that it is stable to the end, and do not use numbers read from tensors but to stop",
        )
    difference = (error / (norm or 1.0)) ** 0.5
    return EarlyStops(questions, difference, difference > ROUNDING)


def export(
    module: nn.Module, inputs: Mapping[str, Tensor], dims: tuple[dict[int, Any], ...] | None = None
) -> ExportedProgram:
    """torch.export with the first axis of every input dynamic and called "batch", or with dynamic axes of one's own.

    Inputs reach the parameters of their names. The program's graph, and its module, take them by position, in the
    order given.
    """
    batch = Dim("batch", min=1)
    args, kwargs = arguments(module, inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: ExportedProgram = torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=tuple({0: batch} for _ in inputs) if dims is None else dims,
                strict=False,
            )
            # Decomposes nothing, but turns writes in place into ordinary operations: a loop that divides its
            # plan in place would otherwise outlive the rewrite, since such nodes never count as dead.
            program = program.run_decompositions({})
            if kwargs:
                by_position(program, inputs)
    except AsapcError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture the model: {first_line(error)}",
            "the forward must work for every batch size, and may branch on values of tensors to end a loop only",
        ) from error
    return program


def by_position(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> None:
    """Let a program that was exported with keyword arguments take them by position, as its graph does."""
    signature = program.module_call_graph[0].signature
    assert signature is not None  # the first is that of the whole program
    example: tuple[tuple[Tensor, ...], dict[str, Tensor]] = (tuple(inputs.values()), {})
    signature.in_spec = tree_structure(example)
    program.example_inputs = example
