"""Stands in for what leaves a graph as an array: models keep attention maps, and log statistics.

During capture there are no values yet, so that such an array holds one stand-in in all its places. It may be kept,
printed and computed with; where it would decide what the code does, or come back into the graph, the model is refused.
"""

from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from asapc.errors import CaptureError

# By their names as methods: numpy's functions on objects call them.
RETURNING_ITSELF = (
    *(f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod") for side in ("", "r")),
    *("__abs__", "__neg__", "__pos__", "__round__"),
    *("sqrt", "exp", "log", "log2", "log10", "conjugate", "floor", "ceil", "sin", "cos", "tanh"),
)
REFUSED = (
    *("__bool__", "__int__", "__float__", "__index__", "__complex__"),
    *("__lt__", "__le__", "__eq__", "__ne__", "__gt__", "__ge__"),
)


class Departed:
    """A number that left the graph; what is computed from it has left it too.

    Attributes:
        source: the "file:line" at which it did.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def __repr__(self) -> str:
        """Return a sign that no value is known."""
        return "?"

    def __format__(self, specification: str) -> str:
        """Return the same, whatever the format."""
        return repr(self)

    def itself(self, *others: Any) -> "Departed":
        """Return the result of a computation, unless it takes the value back to torch."""
        if any(isinstance(other, Tensor) for other in others):
            self.refuse()
        return self

    def refuse(self, *others: Any) -> NoReturn:
        """Raise CaptureError, since a graph cannot follow the value from here."""
        raise CaptureError(
            f"a value that leaves the graph at {self.source} comes back, or decides what the code does",
            "compute it with torch instead of numpy; arrays that are only kept or printed may stay",
        )

    __hash__ = object.__hash__


for names, method in ((RETURNING_ITSELF, Departed.itself), (REFUSED, Departed.refuse)):
    for name in names:
        setattr(Departed, name, method)


def depart(shape: list[int], source: str) -> Any:
    """Return an array that stands for a tensor of data.

    It is of objects, of which torch makes no tensor, and read-only, since what writes to it writes to the tensor too.

    Args:
        shape: the tensor's, in numbers.
        source: the "file:line" that asks for it.
    """
    array = np.full(shape, Departed(source), dtype=object)
    array.flags.writeable = False
    return array
