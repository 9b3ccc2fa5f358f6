"""What a compiled model takes and returns, as its manifest says it: without torch, which a runtime does without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from asapc.errors import InputError


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a compiled model.

    Attributes:
        name: what the model calls it.
        dtype: of its elements, as numpy calls it, e.g. "float32".
        shape: of each axis its size, the name of an open axis, or None where an ONNX file left it open without a name.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def data(self) -> dict[str, Any]:
        """Return it as JSON shows it."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}


class AxisRange(NamedTuple):
    """The least and the largest length of an open axis; None for no limit."""

    low: int
    high: int | None


@dataclass(frozen=True)
class Interface:
    """What a compiled model takes and returns.

    Attributes:
        inputs, outputs: in their order.
        axes: the range of each open axis, by its name.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    axes: Mapping[str, AxisRange]

    def data(self) -> dict[str, Any]:
        """Return the entries of a manifest that say this."""
        return {
            "inputs": [info.data() for info in self.inputs],
            "outputs": [info.data() for info in self.outputs],
            "axes": {name: axis._asdict() for name, axis in self.axes.items()},
        }

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Interface":
        """Read a manifest that keeps to its schema."""
        inputs, outputs = (
            tuple(TensorInfo(info["name"], info["dtype"], tuple(info["shape"])) for info in manifest[key])
            for key in ("inputs", "outputs")
        )
        axes = {name: AxisRange(**limits) for name, limits in manifest["axes"].items()}
        return cls(inputs, outputs, axes)

    def least(self, info: TensorInfo, batch: int = 1) -> tuple[int, ...]:
        """Return the least shape of an input or output for a batch, which is the first axis."""
        batches = {of.shape[0] for of in self.inputs if of.shape and not isinstance(of.shape[0], int)}
        ranges = ((size, self.range_of(size)) for size in info.shape)
        return tuple(max(low, batch) if size in batches else low for size, (low, _) in ranges)

    def range_of(self, size: int | str | None) -> AxisRange:
        """Return the lengths that an axis may have, by its entry of a shape."""
        if isinstance(size, int):
            return AxisRange(size, size)
        return self.axes.get(size or "", AxisRange(1, None))

    def check_shape(self, info: TensorInfo, shape: tuple[int, ...], lengths: dict[str, tuple[str, int]]) -> None:
        """Raise InputError where a shape is not an input's.

        Args:
            info: the input.
            shape: of what was given for it.
            lengths: of open axes that inputs share, with the first input that had one; those of this one are added.
        """
        if len(shape) != len(info.shape):
            raise self.refusal(info, shape, "the first axis is the batch, also for one sample")
        for size, length in zip(info.shape, shape, strict=True):
            low, high = self.range_of(size)
            if length < low or (high is not None and length > high):
                raise self.refusal(info, shape, "give such a shape, or compile with other lengths in --dynamic")
            if isinstance(size, str) and lengths.setdefault(size, (info.name, length))[1] != length:
                other, before = lengths[size]
                raise InputError(
                    f"{info.name} has {length} along {size}, {other} has {before}", "give all inputs the same lengths"
                )

    def refusal(self, info: TensorInfo, shape: tuple[int, ...], hint: str) -> InputError:
        """Return the error that says what an input should be."""
        return InputError(f"{info.name} is {tuple(shape)}; the model takes {self.described(info)}", hint)

    def described(self, info: TensorInfo) -> str:
        """Return shape and dtype of an input or output in words, with the ranges of open axes."""
        return f"({', '.join(map(self.length, info.shape))}) {info.dtype}"

    def length(self, size: int | str | None) -> str:
        """Return the length of an axis in words."""
        if not isinstance(size, str):
            return "any" if size is None else str(size)
        low, high = self.range_of(size)
        if high is None:
            return size if low == 1 else f"{size} of at least {low}"
        return f"{size} of {low} to {high}"
