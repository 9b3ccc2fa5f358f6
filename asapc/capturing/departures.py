"""Arrays in the place of what leaves a graph: models keep attention maps for plots, and log statistics.

During capture there are no values yet, so that such an array holds NaN. It may be kept, plotted, printed and computed
with; where it would decide what the code does, or come back into the graph, the model is refused.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from asapc.errors import CaptureError

# torch makes no tensor of this type, not even by `from_numpy`, which asks nobody.
LONG = np.longdouble
# Packages that draw, log or store: what they ask of an array decides nothing in the model.
OBSERVERS = {"matplotlib", "numpy", "pandas", "PIL", "seaborn", "skimage", "tensorboard", "torchvision", "wandb"}
# What may decide what the code does next, or writes to the array, and so to the tensor that shares its memory.
REFUSED = (
    *("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "argmax", "argmin", "argsort", "nonzero"),
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "fill", "sort"),
)


class Departed(np.ndarray):
    """An array without values; what is computed from it has none either.

    Attributes:
        source: the "file:line" at which it left the graph.
    """

    source: str

    def __array_finalize__(self, of: Any) -> None:
        """Note where it comes from, whichever way it is made."""
        self.source = getattr(of, "source", "")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        """Apply a function of numpy; the result has no values either."""
        if out is not None and not is_observed():
            self.refuse()  # it may write to the memory of a tensor
        return self.alike(getattr(ufunc, method)(*map(plain, inputs), **options))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Apply a function of numpy; the result has no values either."""
        result = super().__array_function__(func, types, args, kwargs)
        if isinstance(result, bool | int | float) and not is_observed():
            self.refuse()
        return self.alike(result)

    def astype(self, *args: Any, **options: Any) -> Any:
        """Return the array, whose type means nothing."""
        return self

    def alike(self, result: Any) -> Any:
        """Return an array, or a number of numpy's, as one without values."""
        if not isinstance(result, np.ndarray | np.generic):
            return result
        array = np.asarray(result).view(Departed)
        array.source = self.source
        return array

    def refuse(self) -> NoReturn:
        """Raise CaptureError, since a graph cannot follow the value from here."""
        raise CaptureError(
            f"a value that leaves the graph at {self.source} comes back, or decides what the code does",
            "compute it with torch instead of numpy; arrays that are only kept, plotted or printed may stay",
        )


def is_observed() -> bool:
    """Return whether the code that calls the caller belongs to one of OBSERVERS."""
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] in OBSERVERS


def refused(name: str) -> Callable[..., Any]:
    """Return a method that refuses the model, unless one of OBSERVERS calls it."""

    def method(self: Departed, *args: Any, **options: Any) -> Any:
        if not is_observed():
            self.refuse()
        return getattr(plain(self), name)(*args, **options)

    return method


for name in REFUSED:
    setattr(Departed, name, refused(name))


def depart(shape: list[int], source: str) -> Departed:
    """Return an array that stands for a tensor of data.

    Args:
        shape: the tensor's, in numbers.
        source: the "file:line" that asks for it.
    """
    array = np.full(shape, np.nan, dtype=LONG).view(Departed)
    array.source = source
    return array


def plain(value: Any) -> Any:
    """Return an array as one of numpy's own."""
    return value.view(np.ndarray) if isinstance(value, Departed) else value
