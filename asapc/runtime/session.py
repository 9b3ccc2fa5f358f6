"""What the runtime asks of an engine that computes a model: one class for each stands beside this file."""

from collections.abc import Mapping
from typing import Any, Protocol


class Session(Protocol):
    """A model that is open on a device, for any number of threads at once.

    Attributes:
        runtime: what computes it, with its version, e.g. "onnxruntime 1.24.1".
        device: where, "cpu" or e.g. "cuda:0".
    """

    runtime: str
    device: str

    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the outputs, in their order, as numpy arrays.

        Args:
            inputs: by their names contiguous numpy arrays of the model's dtypes, shapes within its ranges.

        Raises:
            BuildError: it cannot compute them.
        """
        ...


class Unavailable(Exception):
    """This engine cannot run here; the text says why, to follow the name of the engine."""
