"""What a unit of each kind of work takes on one device."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# The execution providers of ONNX Runtime that costs are measured in.
Provider = Literal["cpu", "cuda"]
SCHEMA = "asapc.costs/1"


@dataclass(frozen=True)
class CostModel:
    """The costs by which the planner compares operators.

    Attributes:
        provider: that of ONNX Runtime in which they were measured.
        precision: "float32" or "float16", of the products.
        device: the CPU's or GPU's name.
        milliseconds: by kind of work, see `planning.costs.work`.
        median_error: median relative error of the estimates, on the operators that were measured.
        file: where they were read from; None for those that asapc carries.
    """

    provider: Provider
    precision: str
    device: str
    milliseconds: Mapping[str, float]
    median_error: float
    file: Path | None = None

    @property
    def name(self) -> str:
        """What reports call it."""
        return "cpu" if self.provider == "cpu" else f"cuda, {self.precision}"
