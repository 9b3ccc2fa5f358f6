"""Arrays in and out of the runtime: numpy's, and tensors of torch where the caller has imported that."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from asapc.errors import InputError
from asapc.types.interface import Interface, TensorInfo


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch, without importing it: only who did can have one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def as_array(name: str, value: Any) -> np.ndarray:
    """Return an input as a numpy array.

    Raises:
        InputError: it is neither an array nor a tensor that numpy has a dtype for, or some of it is masked.
    """
    try:
        if is_tensor(value):
            return np.asarray(value.detach().cpu().resolve_conj().resolve_neg().numpy())
        if not hasattr(value, "__array__"):
            raise TypeError
        if np.ma.is_masked(value):  # the model would get what is under the mask
            raise InputError(f"{name} has masked entries", f"fill them: {name}.filled(VALUE)")
        return np.asarray(value)
    except (TypeError, RuntimeError):  # torch's own for dtypes, layouts and devices that numpy lacks
        kind = f"{value.dtype}, {value.layout}, on {value.device}" if is_tensor(value) else type(value).__name__
        raise InputError(
            f"{name} is a {kind}", "give a numpy array, or a dense tensor of torch in a dtype of numpy"
        ) from None


def like(template: Any, array: np.ndarray) -> Any:
    """Return an output as what an input was: a tensor on its device, or the array itself."""
    return sys.modules["torch"].from_numpy(array).to(template.device) if is_tensor(template) else array


def by_name(interface: Interface, values: tuple[Any, ...], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs by name, in the model's order, however they were given: by position, by keyword or as one mapping.

    Raises:
        InputError: one is missing, unknown or given twice.
    """
    first = values[0] if len(values) == 1 else None
    if isinstance(first, Mapping):
        values, others = (), {**first, **others}
    names = [info.name for info in interface.inputs]
    listed = f"the model's inputs are {', '.join(map(interface_line(interface), interface.inputs))}"
    if len(values) > len(names):
        raise InputError(f"{len(values)} inputs for a model of {len(names)}", listed)
    given = dict(zip(names, values, strict=False))
    if twice := sorted(given.keys() & others.keys()):
        raise InputError(f"{', '.join(twice)} given by position and by name", listed)
    given |= others
    if unknown := [str(name) for name in given if name not in names]:
        raise InputError(f"the model has no input {', '.join(unknown)[:200]}", listed)
    if missing := [name for name in names if name not in given]:
        raise InputError(f"the input {', '.join(missing)} is missing", listed)
    return {name: given[name] for name in names}


def interface_line(interface: Interface) -> Any:
    """Return a function that describes an input in words."""
    return lambda info: f"{info.name} {interface.described(info)}"


def checked(interface: Interface, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return inputs as contiguous arrays of the model's dtypes, all of whose shapes it takes.

    Raises:
        InputError: a dtype, a shape or the length of an axis is not what the model takes.
    """
    lengths: dict[str, tuple[str, int]] = {}
    arrays = {}
    for info in interface.inputs:
        array = as_array(info.name, inputs[info.name])
        interface.check_shape(info, array.shape, lengths)
        convert = f"to(torch.{info.dtype})" if is_tensor(inputs[info.name]) else f"astype({info.dtype!r})"
        arrays[info.name] = np.ascontiguousarray(cast(interface, info, array, convert))
    return arrays


def cast(interface: Interface, info: TensorInfo, array: np.ndarray, convert: str) -> np.ndarray:
    """Return an array in the dtype of an input: float64, numpy's default, as float32, and others where nothing is lost.

    Args:
        interface: of the model.
        info: of the input.
        array: what was given for it.
        convert: the method by which the caller may convert what is refused.

    Raises:
        InputError: something would be.
    """
    if array.dtype.name == info.dtype and array.dtype.isnative:
        return array
    kinds = {"i": "i", "u": "i", "f": "f", "b": "b"}
    aim = np.dtype(info.dtype)
    same_kind = kinds.get(array.dtype.kind) == kinds.get(aim.kind, "")
    narrowed = (array.dtype.name, aim.name) == ("float64", "float32")
    if not same_kind or not (narrowed or np.can_cast(array.dtype, aim, "safe")):
        raise InputError(
            f"{info.name} is {array.dtype.name}; the model takes {interface.described(info)}",
            f"convert it: {info.name}.{convert}",
        )
    return array.astype(aim)
