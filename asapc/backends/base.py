"""What a backend offers."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from asapc.types.samples import Samples


class Runner(Protocol):
    """A model ready to run: the same inputs and outputs whatever the runtime."""

    @property
    def runtime(self) -> str:
        """Name of the runtime, e.g. "onnxruntime"."""
        ...

    def __call__(self, samples: Samples) -> list[Tensor]:
        """All tensor outputs of the model for one batch."""
        ...


def temporary(path: Path) -> Path:
    """Name to write to before renaming to `path`, so that a failure leaves no half-written file."""
    return path.with_name(path.name + ".partial")
