"""Inputs of a model, with labels where there are any."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of the model, by the names of its forward's parameters, with labels where there are any.

    Attributes:
        inputs: tensors whose first axis is the sample axis, equally long.
        labels: (samples,) class indices, or None.
        cast: names of inputs that were float64 and are float32 now, as the model's parameters are.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None
    cast: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: slice | list[int]) -> "Samples":
        labels = None if self.labels is None else self.labels[index]
        return Samples({name: value[index] for name, value in self.inputs.items()}, labels, self.cast)

    def batches(self, size: int) -> Iterator["Samples"]:
        """Yield the samples in order, `size` at a time; the last batch may be shorter."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
