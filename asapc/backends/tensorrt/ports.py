"""What goes into an engine: types and shapes, by numpy's names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# By TensorRT's names; numpy has no bfloat16, and the engines of asapc take and return what the model does.
DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Port:
    """An input of an engine: its type, and the smallest and largest shape that the engine takes."""

    dtype: "np.dtype[Any]"
    low: tuple[int, ...]
    high: tuple[int, ...]

    def __str__(self) -> str:
        sizes = (str(a) if a == b else f"{a} to {b}" for a, b in zip(self.low, self.high, strict=True))
        return f"{self.dtype} ({', '.join(sizes)})"

    def takes(self, shape: Sequence[int]) -> bool:
        """Return whether a shape lies between the two."""
        bounds = zip(self.low, shape, self.high, strict=False)
        return len(shape) == len(self.low) and all(low <= size <= high for low, size, high in bounds)
