"""Unpickles the parts of plain tensors and containers; all else that a pickle names becomes an idle object.

`torch.load` takes this module instead of `pickle`. torch's own reader for untrusted files knows fewer protocols,
and gives up a whole file for one object of another library beside its tensors.
"""

import collections
import pickle
from collections.abc import Callable
from typing import IO, Any

import torch


class Unread:
    """Stands for an object of a class, or the result of a function, that is not looked up; takes whatever it is given.

    Its type has the name that the pickle gives.
    """

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> "Unread":
        """Take any arguments."""
        return super().__new__(cls)

    def swallow(self, *_: object, **__: object) -> "Unread":
        """Take any arguments, and keep none."""
        return self

    __call__ = __setitem__ = __setstate__ = append = extend = add = swallow


def name_of(value: object) -> str | None:
    """Return what a pickle calls a value or class that was not read, None where it is none of these."""
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"[:80] if issubclass(kind, Unread) else None


def encode(text: str, encoding: str) -> bytes:
    """Return the bytes that pickles of protocol 2 write as text."""
    if encoding != "latin1":
        raise ValueError(encoding)
    return text.encode(encoding)


def plain_dict(*_: object) -> dict[Any, Any]:
    """Return the dict that stands for one with a default."""
    return {}


def without_state(data: object, *_: object) -> object:
    """Return a parameter's values, without its attributes."""
    return data


def without_type(make: Callable[..., object], _: object, args: tuple[object, ...], *__: object) -> object:
    """Return the plain tensor inside one of a subclass, or with attributes."""
    return make(*args)


DTYPES = ["bfloat16", "bool", "complex64", "complex128", "qint8", "quint8", "qint32"]
DTYPES += [f"{kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)]
DTYPES += [f"float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")]
SCHEMES = [f"per_{part}_{kind}" for part in ("tensor", "channel") for kind in ("affine", "symmetric")]
REBUILD = ["tensor", "tensor_v2", "tensor_v3", "parameter", "qtensor"]
# What a pickle may name, by module and name. torch itself looks up the types of storages.
KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): collections.Counter,
    ("collections", "defaultdict"): plain_dict,
    ("_codecs", "encode"): encode,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch._utils", "_rebuild_parameter_with_state"): without_state,
    ("torch._tensor", "_rebuild_from_type_v2"): without_type,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex)},
    **{("torch._utils", f"_rebuild_{kind}"): getattr(torch._utils, f"_rebuild_{kind}") for kind in REBUILD},
    **{("torch", name): getattr(torch, name) for name in DTYPES + SCHEMES if hasattr(torch, name)},
}


class Unpickler(pickle.Unpickler):
    """Looks names up in KNOWN alone. `check_pickle` has refused what could change the objects there."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for; imports nothing."""
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        return type(name, (Unread,), {"__slots__": (), "__module__": module})


def load(file: IO[bytes], **options: Any) -> Any:
    """Load as `pickle.load` does."""
    return Unpickler(file, **options).load()
