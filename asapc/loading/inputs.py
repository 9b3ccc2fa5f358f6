"""Tells how inputs reach a model: by which names, in which order, and in which shapes if its file says so."""

import copy
import inspect
import re
import shlex
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asapc.errors import SamplesError
from asapc.loading.samples import DTYPES, UNNAMED
from asapc.types.model import InputType, LoadedModel
from asapc.types.samples import Samples

ANY = "input"  # what an array without a name is called where the forward does not name its inputs either


def order_inputs(loaded: LoadedModel, samples: Samples) -> Samples:
    """Put samples in the order of the model's inputs: graphs take them by position from here on.

    An array without a name becomes the model's only input, and float64, numpy's default, what the model computes in.

    Raises:
        SamplesError: their names are not those of the model's inputs, or their shapes not those of its export.
    """
    names, required = input_names(loaded, samples)
    samples = named(samples, required if len(required) == 1 else names)
    if not samples.inputs.keys() <= set(names) or not set(required) <= samples.inputs.keys():
        raise SamplesError(
            f"the samples hold {', '.join(samples.inputs)}; the model's inputs are {', '.join(names) or 'not named'}",
            "name the arrays as the parameters of the model's forward",
        )
    inputs = {name: samples.inputs[name] for name in names if name in samples.inputs}
    ordered = narrowed(replace(samples, inputs=inputs), [name for name in inputs if in_float32(loaded, name)])
    compare_types(loaded.path, ordered, loaded.inputs or {})
    return ordered


def narrowed(samples: Samples, names: Collection[str]) -> Samples:
    """Return samples with float64, numpy's default, as float32 in the inputs of these names."""
    cast = tuple(name for name, value in samples.inputs.items() if name in names and value.dtype == torch.float64)
    inputs = {**samples.inputs, **{name: samples.inputs[name].float() for name in cast}}
    return replace(samples, inputs=inputs, cast=samples.cast or cast)


def as_exported(samples: Samples, inputs: Mapping[str, InputType]) -> Samples:
    """Return samples with the name of an only input, and in float32 where an exported model takes that.

    Raises:
        SamplesError: an array without a name could be one of several inputs.
    """
    in_float32 = [name for name, kind in inputs.items() if kind.dtype == torch.float32]
    return narrowed(named(samples, list(inputs)), in_float32)


def named(samples: Samples, names: Sequence[str]) -> Samples:
    """Return samples with a name for an array that has none: that of the only input.

    Raises:
        SamplesError: there are several inputs.
    """
    if samples.inputs.keys() != {UNNAMED}:
        return samples
    if len(names) != 1:
        raise SamplesError(
            f"the samples are one array without a name; the model's inputs are {', '.join(names) or 'not named'}",
            "name the arrays as the parameters of the model's forward",
        )
    return replace(samples, inputs={names[0]: samples.inputs[UNNAMED]})


def in_float32(loaded: LoadedModel, name: str) -> bool:
    """Return whether a model takes an input in float32: as it was exported, else as its parameters are."""
    if loaded.inputs is not None:
        return name in loaded.inputs and loaded.inputs[name].dtype == torch.float32
    floats = {p.dtype for p in loaded.module.parameters() if p.is_floating_point()}
    return floats == {torch.float32}


def input_names(loaded: LoadedModel, samples: Samples) -> tuple[list[str], list[str]]:
    """Return the names of all inputs of a model, and of those that it cannot do without.

    A forward that takes any number of inputs takes them as the samples name them, in their order. So does a parameter
    that is a dict or a tuple: `batch.frames`, `pair.0`.
    """
    if loaded.inputs is not None:
        return list(loaded.inputs), list(loaded.inputs)
    parameters = inspect.signature(loaded.module.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    of_parameter = {p.name: [n for n in samples.inputs if n.startswith(f"{p.name}.")] or [p.name] for p in named}
    names = [name for p in named for name in of_parameter[p.name]]
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        names += [name or ANY for name in samples.inputs if name not in names]
    elif only_keywords(loaded.module):
        names = [name for name in samples.inputs if name != UNNAMED]
    return names, [name for p in named if p.default is p.empty for name in of_parameter[p.name]]


def only_keywords(module: nn.Module) -> bool:
    """Return whether a forward takes `**kwargs` alone. Beside parameters they would take misspelt names too."""
    return [p.kind for p in inspect.signature(module.forward).parameters.values()] == [inspect.Parameter.VAR_KEYWORD]


def compare_types(path: Path, samples: Samples, inputs: Mapping[str, InputType]) -> None:
    """Raise SamplesError where samples are not what the exported model in a file takes."""
    for name, kind in inputs.items():
        value = samples.inputs[name]
        sizes = tuple(value.shape) if kind.sizes is None else kind.sizes
        same = len(sizes) == value.dim() and all(s in (None, n) for s, n in zip(sizes, value.shape, strict=True))
        if same and value.dtype == kind.dtype:
            continue
        expected = ", ".join(["batch", *("any" if size is None else str(size) for size in sizes[1:])])
        raise SamplesError(
            f"{name} is {tuple(value.shape)} {value.dtype}; {path} takes ({expected}) {kind.dtype}",
            "give samples of that shape and dtype",
        )


def arguments(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that pass inputs, in the model's order, to the forward."""
    if only_keywords(module):
        return (), nested(inputs)
    signature = inspect.signature(module.forward)
    roots = {name.partition(".")[0] for name in inputs.keys() - signature.parameters.keys()}
    if roots <= signature.parameters.keys() - inputs.keys():
        inputs = nested(inputs)
    if not inputs.keys() <= signature.parameters.keys():  # `*args`, or an ONNX file's, whose names need not be Python's
        return tuple(inputs.values()), {}
    bound = inspect.BoundArguments(signature, OrderedDict(inputs))
    return bound.args, bound.kwargs


def flattened(module: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """Return a module whose forward has a parameter for each input, with the same weights; itself where it does."""
    parameters = inspect.signature(module.forward).parameters.values()
    args, kwargs = arguments(module, inputs)
    plain = all(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
    if plain and not only_keywords(module) and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return module

    def forward(*values: Tensor) -> Any:
        args, kwargs = arguments(module, dict(zip(inputs, values, strict=True)))
        return module.forward(*args, **kwargs)

    # A copy, and no wrapper, which would lengthen the names of all modules within.
    flat = copy.copy(module)
    flat.__dict__["forward"] = with_signature(forward, inputs)
    return flat


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the first parts of their names: dicts by the parts that follow, tuples where these count."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            tree.setdefault(first, {})[rest] = value
        else:
            tree[first] = value
    return {name: counted(nested(value)) if isinstance(value, dict) else value for name, value in tree.items()}


def counted(values: dict[str, Any]) -> Any:
    """Return values as a tuple where their names are 0, 1 and so on."""
    return tuple(values.values()) if list(values) == [str(i) for i in range(len(values))] else values


def with_signature(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """Wrap a function of tensors so that its parameters bear the names of inputs, as far as Python allows them."""

    def forward(*inputs: Tensor) -> Any:
        return function(*inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in identifiers(names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def identifiers(names: Iterable[str]) -> Iterator[str]:
    """Yield names that Python allows, all different."""
    for i, name in enumerate(names):
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        yield name if name.isidentifier() and name.isascii() else f"input_{i}_{plain[:40]}"


def shape_options(loaded: LoadedModel) -> str:
    """Return the options that describe the inputs of an exported model, ready to copy; for other models an example."""
    kinds = {name: (kind.sizes, str(kind.dtype).removeprefix("torch.")) for name, kind in (loaded.inputs or {}).items()}
    if not kinds or any(sizes is None or dtype not in DTYPES for sizes, dtype in kinds.values()):
        return "--input-shape x=2,197,64:float32"
    texts = [
        f"{name}={','.join(['2', *('SIZE' if size is None else str(size) for size in (sizes or ())[1:])])}:{dtype}"
        for name, (sizes, dtype) in kinds.items()
    ]
    return " ".join(f"--input-shape {shlex.quote(text)}" for text in texts)
