"""Reads samples from files, and draws random example inputs of given shapes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asapc.errors import OptionError, SamplesError
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_npy, read_npz, read_torch
from asapc.types.samples import Samples

# Larger inputs are a slip of the keyboard, and would not fit into memory.
MAX_INPUT_BYTES = 2**30
FLOATS = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
INTEGERS = {name: getattr(torch, name) for name in ("int64", "int32", "int16", "int8", "uint8")}
ONE_ARRAY_EACH = "give one array for each input of the model, all with the same number of samples"
UNNAMED = ""  # the name of an array that a file holds without one
DTYPES = FLOATS | INTEGERS | {"bool": torch.bool}


class InputShape(NamedTuple):
    """An input as `--input-shape` describes it; integers are drawn from low to high, inclusive."""

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    low: int
    high: int


def load_samples(path: Path) -> Samples:
    """Read samples from a .npz, .npy or .pt file: arrays named as the model's inputs, and optional `labels`.

    One array alone, or a list of tensors, one a sample, is for models of one input; it is named UNNAMED.

    Raises:
        SamplesError: the file is missing or unreadable, or its content cannot be samples.
    """
    if path.suffix == ".npz":
        content: Any = read_npz(Source.at(path, SamplesError))
    elif path.suffix in (".pt", ".pth"):
        content = read_torch(Source.at(path, SamplesError))
    elif path.suffix == ".npy":
        content = read_npy(Source.at(path, SamplesError))
    else:
        raise SamplesError(f"{path} is neither .npz, .npy nor .pt", "save the samples with numpy.savez or torch.save")
    if isinstance(content, list | tuple) and content and all(isinstance(value, Tensor) for value in content):
        content = stacked(path, content)
    if isinstance(content, Tensor):
        content = {UNNAMED: content}
    if not isinstance(content, Mapping):
        raise SamplesError(f"{path} holds a {type(content).__name__}", "save a dict of arrays by input name")
    inputs = {name: value for name, value in content.items() if name != "labels"}
    return as_samples({"inputs": inputs, "labels": content.get("labels")}, str(path))


def stacked(path: Path, values: Sequence[Tensor]) -> Tensor:
    """Join a list of samples into one array.

    Raises:
        SamplesError: they differ in shape or dtype.
    """
    kinds = {(tuple(value.shape), value.dtype) for value in values}
    if len(kinds) > 1:
        raise SamplesError(f"{path} holds a list of tensors of {len(kinds)} shapes or dtypes", ONE_ARRAY_EACH)
    return torch.stack(list(values))


def as_samples(content: Any, label: str) -> Samples:
    """Check and wrap {"inputs": {name: tensor}, "labels": tensor or None}; `label` begins the messages."""
    inputs = content.get("inputs") if isinstance(content, Mapping) else None
    if not isinstance(inputs, Mapping) or not inputs or not all(isinstance(name, str) for name in inputs):
        raise SamplesError(f"{label}: no inputs", ONE_ARRAY_EACH)
    labels = content.get("labels")
    arrays = dict(inputs) if labels is None else {**inputs, "labels": labels}
    for name, value in arrays.items():
        check_values(f"{label}: {name[:80] or 'the array'}", value)
    if labels is not None and not is_class_index(labels):
        raise SamplesError(f"{label}: labels must be one class index a sample", "give integers, not one-hot rows")
    sizes = {name: len(value) for name, value in arrays.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{count} of {name[:80]}" for name, count in list(sizes.items())[:8])
        raise SamplesError(f"{label}: different numbers of samples, {counts}", ONE_ARRAY_EACH)
    return Samples(dict(inputs), labels)


def check_values(label: str, value: Any) -> None:
    """Raise SamplesError unless a value is a tensor with a sample axis, and finite."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        raise SamplesError(f"{label} is not an array with a sample axis", ONE_ARRAY_EACH)
    if not is_finite(value):
        raise SamplesError(f"{label} holds NaN or infinity", "remove those samples")


def is_class_index(labels: Tensor) -> bool:
    """Return whether labels are one integer a sample."""
    other = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    return labels.dim() == 1 and not other


def is_finite(value: Tensor) -> bool:
    """Return whether a tensor holds no NaN and no infinity."""
    return bool(torch.isfinite(widened(value)).all())


def has_nan(value: Tensor) -> bool:
    """Return whether a tensor holds NaN; infinities may be meant."""
    return bool(torch.isnan(widened(value)).any())


def widened(value: Tensor) -> Tensor:
    """Convert floats of 8 bits, whose values torch cannot test, to float32."""
    return value.float() if value.is_floating_point() and value.itemsize == 1 else value


def parse_shape(text: str) -> InputShape:
    """Parse the description of an input, e.g. "x=2,197,64", "mask=2,128:bool" or "ids=2,128:int64:0..30000".

    Raises:
        OptionError: it has another form, an unknown dtype, or too many elements.
    """
    hint = "use NAME=SIZE,SIZE,...:DTYPE, the batch first, e.g. x=2,197,64:float32 or ids=2,128:int64:0..30000"
    match = re.fullmatch(r"([^\s=]{1,80})=(\d{1,9}(?:,\d{1,9})*)(?::(\w+)(?::(-?\d{1,18})\.\.(-?\d{1,18}))?)?", text)
    if match is None:
        raise OptionError(f"cannot read the input shape {text[:200]!r}", hint)
    name, sizes, dtype = match[1], tuple(int(size) for size in match[2].split(",")), match[3] or "float32"
    if dtype not in DTYPES:
        raise OptionError(f"the input {name} has the unknown dtype {dtype!r}", f"use one of {', '.join(DTYPES)}")
    if 0 in sizes or prod(sizes) * DTYPES[dtype].itemsize > MAX_INPUT_BYTES:
        raise OptionError(f"the input {name} is empty or larger than {MAX_INPUT_BYTES:,} bytes: {match[2]}", hint)
    if match[4] is None:
        return InputShape(name, sizes, DTYPES[dtype], 0, 1)
    if dtype not in INTEGERS:
        raise OptionError(f"the input {name} has a range, but is {dtype}", "ranges are for integers")
    low, high = int(match[4]), int(match[5])
    if low > high or not fits(low, high, DTYPES[dtype]):
        raise OptionError(f"the input {name} has the range {low}..{high}", f"give low..high, within {dtype}")
    return InputShape(name, sizes, DTYPES[dtype], low, high)


def fits(low: int, high: int, dtype: torch.dtype) -> bool:
    """Return whether an integer dtype can hold both numbers."""
    info = torch.iinfo(dtype)
    return info.min <= low and high <= info.max


def draw_inputs(shapes: Iterable[str], seed: int) -> Samples:
    """Draw random inputs of given shapes: normal floats, integers of their range, masks that are mostly true.

    They are good enough to capture a model and to examine its structure, never to calibrate it. There are at least two
    samples.

    Raises:
        OptionError: a shape cannot be parsed, or the inputs differ in their batch.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for shape in map(parse_shape, shapes):
        if shape.name in inputs:
            raise OptionError(f"the input {shape.name} has two shapes", "give --input-shape once for each input")
        sizes = (max(shape.sizes[0], 2), *shape.sizes[1:])
        if shape.dtype.is_floating_point:
            inputs[shape.name] = torch.randn(sizes, generator=generator).to(shape.dtype)
        elif shape.dtype == torch.bool:
            inputs[shape.name] = torch.rand(sizes, generator=generator) < 0.9
        else:
            integers = torch.randint(shape.low, shape.high + 1, sizes, generator=generator)
            inputs[shape.name] = integers.to(shape.dtype)
    if len({len(value) for value in inputs.values()}) > 1:
        raise OptionError("the input shapes differ in their first size", "the first size of each input is the batch")
    return Samples(inputs)
