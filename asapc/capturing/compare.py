"""Compares the outputs of a model and its graph: their types, for a batch of one, and with early stops."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, register_dataclass
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from asapc.errors import AsapcError, CaptureError, SamplesError
from asapc.loading.inputs import arguments
from asapc.loading.lines import remedy, told
from asapc.types.graph import CapturedGraph, EarlyStops
from asapc.types.samples import Samples

COMPARED_BATCH = 32  # samples at a time
# Relative; larger than what reordering the same operations changes in float32.
ROUNDING = 1e-6
# Relative to the difference of a model and its graph for several samples, and beyond rounding: with half-precision
# floats, or random numbers in the forward, they always differ.
SINGLE_RATIO, SINGLE_ROUNDING = 10, 1e-3


def run(module: nn.Module, batch: Samples, samples: Samples) -> list[Tensor]:
    """Return all floating outputs of a model for one batch of the samples, in float64.

    Raises:
        SamplesError: the model refuses them.
        CaptureError: it returns something other than tensors.
    """
    try:
        args, kwargs = arguments(module, batch.inputs)
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except AsapcError:
        raise
    except (Exception, SystemExit) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in samples.inputs.items())
        raise SamplesError(
            f"the model does not run on these samples ({shapes}): {told(error)}",
            remedy(
                error,
                other_type(module, batch, error)
                or "mend the line, or give samples of the shape and dtype that the model was trained on",
            ),
        ) from error
    register_dataclasses(outputs)
    check_outputs(outputs)
    leaves = tree_leaves(outputs)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def other_type(module: nn.Module, batch: Samples, error: BaseException) -> str | None:
    """Return what to do where a model of another floating type than its samples refuses them; None elsewhere."""
    of_model, of_samples = (
        {value.dtype for value in values if value.is_floating_point()}
        for values in (module.parameters(), batch.inputs.values())
    )
    if "type" not in str(error) or not of_model or not of_samples or of_model & of_samples:
        return None
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in of_model))
    return (
        f"the weights are {names}: build the model in the samples' type, with model.float(), or give samples of its own"
    )


def register_dataclasses(outputs: Any) -> None:
    """Tell torch which dataclasses a model returns, so that it looks into them."""
    for leaf in tree_leaves(outputs):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            register_dataclass(type(leaf))
            register_dataclasses(leaf)


def check_outputs(outputs: Any) -> None:
    """Raise CaptureError where a model returns anything but tensors; None is ignored."""
    leaves = [(path, leaf) for path, leaf in tree_flatten_with_path(outputs)[0] if leaf is not None]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            where = f"{keystr(path)} of the model's outputs is" if path else "the model's output is"
            raise CaptureError(
                f"a graph can only return tensors: {where} of type {type(leaf).__name__}",
                "omit it from what the forward returns, or return None instead",
            )
    if not leaves:
        raise CaptureError("the model returns nothing", "return the output tensors from the forward")


def check_single(module: nn.Module, program: ExportedProgram, example: Samples, stops: bool = False) -> None:
    """Raise CaptureError where a graph and its model differ for a batch of one.

    Code may treat it specially, as `squeeze()` does; a graph was captured with several samples and has one path only.

    Args:
        module: the model.
        program: its graph.
        example: what it was captured with.
        stops: whether the model stops early: the numbers then differ anyway, and only shapes can be compared.
    """
    hint = "let the forward treat a batch of one like any other; squeeze() without a dimension, for one, does not"
    graph, differences, axes = program.module(), [], []
    for batch in (example, example[:1]):
        try:
            expected, actual = run(module, batch, batch), run(graph, batch, batch)
        except SamplesError as error:
            raise CaptureError(f"at batch {len(batch)} {error}", hint) from error
        shapes = [", ".join(str(tuple(value.shape)) for value in values) for values in (expected, actual)]
        if shapes[0] != shapes[1]:
            raise CaptureError(f"at batch {len(batch)} the model returns {shapes[0]}, its graph {shapes[1]}", hint)
        axes.append([value.dim() for value in expected])
        error_square, norm = squares(expected, actual)
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


def squares(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, float]:
    """Sum the squares of the differences of some outputs, infinite where only one is finite, and of the expected ones.

    Equal infinities, as in masked scores, and NaN in the same places do not count as differences.
    """
    error = norm = 0.0
    for reference, candidate in zip(expected, actual, strict=True):
        same = (candidate == reference) | (candidate.isnan() & reference.isnan())
        error += torch.where(same, 0.0, candidate - reference).square().nan_to_num(nan=inf, posinf=inf).sum().item()
        norm += torch.where(reference.isfinite(), reference, 0.0).square().sum().item()
    return error, norm


def compare_stops(
    module: nn.Module, graph: CapturedGraph, samples: Samples, questions: Mapping[str, str]
) -> EarlyStops:
    """Measure what omitting early stops changes: the outputs of a model against those of its graph.

    Raises:
        CaptureError: one of the two returns NaN or infinity where the other does not.
    """
    program = graph.program.module()
    error = norm = 0.0
    for batch in samples.batches(graph.samples_at_once(COMPARED_BATCH)):
        more = squares(run(module, batch, samples), run(program, batch, samples))
        error, norm = error + more[0], norm + more[1]
    if not isfinite(error):
        raise CaptureError(
            f"with and without the early stop at {', '.join(questions)} "
            "the model returns NaN or infinity for different samples",
            "bound the loop so that it is stable to the end, and use numbers read from tensors only to stop",
        )
    difference = (error / (norm or 1.0)) ** 0.5
    return EarlyStops(questions, difference, difference > ROUNDING)
