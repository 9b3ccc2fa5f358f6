"""A model as one graph."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.export import ExportedProgram

from asapc.types.samples import Samples


@dataclass(frozen=True, eq=False)
class EarlyStops:
    """The early stops that a captured model omits, and what that changes.

    Attributes:
        questions: the lines of code that ask whether to stop, by their "file:line".
        difference: of the captured outputs from the model's own on the calibration samples, relative to their norm.
        taken: whether that is more than rounding, so that the model does stop earlier.
    """

    questions: Mapping[str, str]
    difference: float
    taken: bool


@dataclass(frozen=True)
class DynamicAxis:
    """An open axis of an input, or of several.

    Attributes:
        name: those of one name have one length.
        low, high: its least and largest length; None for no limit.
    """

    name: str
    low: int
    high: int | None


BATCH_AXIS = DynamicAxis("batch", 1, None)


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """A model as one graph with a dynamic batch.

    Attributes:
        program: the exported program.
        example: the inputs it was captured with, batch at least 2.
        early_stops: the early stops that it omits; None where the model has none.
        axes: its open axes by the input's name and their number; None for the first of each, the batch, alone.
    """

    program: ExportedProgram
    example: Samples
    early_stops: EarlyStops | None = None
    axes: Mapping[str, Mapping[int, DynamicAxis]] | None = None
