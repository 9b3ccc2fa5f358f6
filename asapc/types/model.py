"""A loaded model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from asapc.types.samples import Samples


@dataclass(frozen=True)
class InputType:
    """Shape and dtype of one input of an exported model.

    Attributes:
        sizes: of its axes, None for those that are left open, as the first always is; None where nothing is known.
        dtype: of its elements.
    """

    sizes: tuple[int | None, ...] | None
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model in evaluation mode, and the samples that came with it.

    Models that came as a graph are of a class of their own, in `loading`.

    Attributes:
        module: the model; `loading.inputs.arguments` says how `Samples.inputs` reach it.
        path: the file it was read from.
        sha256: hash of that file.
        parameters: number of parameters.
        calibration: samples for fitting, None where the file carries none.
        held_out: samples that no stage fits on, None where the file carries none.
        inputs: what an exported model takes, by name and in its order; None for code, whose forward has parameters.
        example: inputs that are good enough to capture the model with, not to fit on; None for none.
        notes: what the user should know about how the file was read.
        output_names: what to call the outputs, in their order; empty for the names that the model gives them.
        call: the class or function that built the module, and its arguments, as JSON; None where the file holds more of
            the model than weights.
    """

    module: nn.Module
    path: Path
    sha256: str
    parameters: int
    calibration: Samples | None
    held_out: Samples | None
    inputs: Mapping[str, InputType] | None = None
    example: Samples | None = None
    notes: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    call: str | None = None
