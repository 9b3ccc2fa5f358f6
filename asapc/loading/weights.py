"""Finds a model's weights in a checkpoint's content, by structure, and loads them into the model."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asapc.errors import CheckpointError, OptionError
from asapc.loading.samples import has_nan, is_finite
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import METADATA

NamedTensors = Iterable[tuple[str, Tensor]]
ONE_RUN = "the weights and the model's arguments must be from the same training run"
COMPILED = "_orig_mod."  # of torch.compile
MAX_WRAPPERS = 4  # {"model": {...}}, and what trainers put around that
ADAPTER = (".lora_A.", ".lora_B.", ".lora_embedding_A")  # in the names of tensors, of peft
MAX_NAMES = 20  # of the model's weights, by which prefixes are found


class Reading(NamedTuple):
    """Tensors in a file that may be a model's weights.

    Attributes:
        place: the keys that lead to them, "" for the file itself.
        removed: what was removed from the names of tensors.
        weights: the tensors, by the names that remain, with the versions of modules as torch keeps them.
        left: names of tensors beside them that belong to other modules.
    """

    place: str
    removed: tuple[str, ...]
    weights: "OrderedDict[str, Any]"
    left: tuple[str, ...]

    @property
    def label(self) -> str:
        """What the user calls it: the keys that lead to the tensors, and the beginning of their names."""
        prefix = "".join(part for part in self.removed if part != COMPILED)
        return f"{self.place}.{prefix}".strip(".") or "."

    @property
    def names(self) -> list[str]:
        """All names of tensors, those left over among them."""
        return [*map(str, self.weights), *self.left]


def load_weights(source: Source, name: str, module: nn.Module, content: Any, label: str | None = None) -> list[str]:
    """Find the weights of a model in a file's content, and load them into it.

    Those are taken that cover the model: that its own strict `load_state_dict`, hooks and all, accepts.

    Args:
        source: the file, for messages.
        name: of the model, for messages.
        module: the model.
        content: of the file: nested mappings, one of which holds the weights.
        label: the label of those to take, where there are several.

    Returns:
        Notes for the user: where the weights were found, and what was done to them.

    Raises:
        CheckpointError: there are none, they do not fit, or several do that differ.
        OptionError: there are none of that label.
    """
    expected = module.state_dict()
    candidates = [c for place, weights in tensor_mappings(content) for c in read_in_ways(place, weights, expected)]
    if not candidates:
        raise CheckpointError(f"{source} holds no weights", "save model.state_dict()")
    if label is not None:
        labels = {candidate.label: None for candidate in candidates}
        candidates = [candidate for candidate in candidates if candidate.label == label]
        if not candidates:
            raise OptionError(f"{source} holds no weights {label!r}", f"give one of {', '.join(labels)}")
    fitting = [candidate for candidate in candidates if covers(source, name, module, candidate)]
    if not fitting and any(mark in key for candidate in candidates for key in candidate.names for mark in ADAPTER):
        raise CheckpointError(
            f"{source} holds an adapter (LoRA) of a model, not the model's own weights",
            "merge it into its model first, with model.merge_and_unload(), and save that model's state_dict()",
        )
    # Where none fits, the nearest says what is wrong.
    best, *others = fitting or [max(candidates, key=lambda candidate: shared(candidate.weights, expected))]
    rivals = [candidate.label for candidate in others if not equal(candidate.weights, best.weights)]
    if rivals:
        raise CheckpointError(
            f"{source} holds several weights that fit {name}, and they differ: {', '.join([best.label, *rivals])}",
            f"say which with --weights: {best.label}, for one",
        )
    give_weights(source, name, module, best.weights)
    return [*place_notes(best), *dtype_notes(best.weights, expected)]


def covers(source: Source, name: str, module: nn.Module, candidate: Reading) -> bool:
    """Return whether weights are those of a model, tried on a copy."""
    if not shared(candidate.weights, module.state_dict()):
        return False
    try:
        trial = copy.deepcopy(module)
    except RuntimeError:  # it holds results of operations, as old weight norm does; those taken overwrite a trial
        trial = module
    try:
        give_weights(source, name, trial, candidate.weights)
    except CheckpointError:
        return False
    return True


def equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two sets of weights are the same."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def tensor_mappings(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the mappings in nested mappings that hold tensors by name, outer ones first."""
    if not isinstance(content, Mapping) or depth > MAX_WRAPPERS:
        return
    if any(isinstance(value, Tensor) and isinstance(key, str) for key, value in content.items()):
        yield place, content
    for key, value in content.items():
        if isinstance(key, str):
            yield from tensor_mappings(value, f"{place}.{key}" if place else key, depth + 1)


def read_in_ways(place: str, weights: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Reading]:
    """Yield the ways to read a mapping as weights of a model, by the prefixes that its names may have.

    torch.compile puts "_orig_mod." somewhere, DataParallel "module." and trainers the name of their attribute at the
    front. What does not begin so, or belongs to modules that the model lacks, is left over: a loss, a metric, another
    model, the counter of those averaged.
    """
    by_name = {key.replace(COMPILED, ""): value for key, value in weights.items() if isinstance(key, str)}
    if len(by_name) < len(weights):  # two names became one, or a name is not a string: the comparison names it
        yield Reading(place, (), OrderedDict(weights), ())
        return
    removed = (COMPILED,) if any(COMPILED in key for key in weights) else ()
    for prefix in prefixes(by_name, expected):
        inner = {key.removeprefix(prefix): value for key, value in by_name.items() if key.startswith(prefix)}
        own = {key: value for key, value in inner.items() if is_own(key, value, expected)}
        state = OrderedDict(own)
        setattr(state, METADATA, rename_modules(getattr(weights, METADATA, {}), prefix))
        left = sorted(key for key in by_name if not key.startswith(prefix) or key.removeprefix(prefix) not in own)
        yield Reading(place, (*removed, prefix) if prefix else removed, state, tuple(left))


def is_own(key: str, value: Any, expected: Mapping[str, Any]) -> bool:
    """Return whether an entry has to be a model's: by its name, or as a tensor of the model itself or its modules."""
    module, dot, _ = key.partition(".")
    return key in expected or (
        isinstance(value, Tensor) and (not dot or any(e.startswith(module + dot) for e in expected))
    )


def prefixes(names: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return what names of tensors may begin with before those of a model's weights; nothing at all among it."""
    distinct = {"": None}
    for name in islice(expected, MAX_NAMES):
        distinct |= {key[: -len(name)]: None for key in names if key.endswith(f".{name}")}
    return list(distinct)


def rename_modules(versions: Mapping[str, Any], prefix: str) -> "OrderedDict[str, Any]":
    """Return the versions of modules by their names without a prefix, as `Reading.weights` are named."""
    by_name = {f"{name}.".lstrip(".").replace(COMPILED, ""): value for name, value in versions.items()}
    return OrderedDict(
        (name.removeprefix(prefix).rstrip("."), value) for name, value in by_name.items() if name.startswith(prefix)
    )


def shared(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    """Count the weights that fit a model's by name and shape."""
    fitting = (key for key, value in weights.items() if key in expected and isinstance(value, Tensor))
    return sum(isinstance(expected[key], Tensor) and expected[key].shape == weights[key].shape for key in fitting)


def compare_weights(source: Source, name: str, module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the first offender, where weights that a model refuses differ from its own.

    A tied weight may come under one of its names only, and a buffer that the model does not save may come too.
    """
    state = module.state_dict()
    expected = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    tied = {key for keys in ties(expected) if keys & weights.keys() for key in keys}
    missing = expected.keys() - weights.keys() - tied
    unknown = weights.keys() - state.keys() - dict(module.named_buffers()).keys()
    for problem, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            raise CheckpointError(f"{source} {problem} weights of {name}: {first_of(keys)}", ONE_RUN)
    for key, value in weights.items():
        if key in expected:
            compare_weight(source, name, key, value, expected[key])


def first_of(keys: Iterable[Any]) -> str:
    """Name the first of some weights, and count the others."""
    first, *more = sorted(map(str, keys))
    return first[:200] + (f" and {len(more)} more" if more else "")


def compare_weight(source: Source, name: str, key: str, value: Any, expected: Tensor) -> None:
    """Raise CheckpointError unless a weight has the shape and kind of number that the model has, and is finite."""
    if not isinstance(value, Tensor) or (value.shape, number_kind(value)) != (expected.shape, number_kind(expected)):
        actual = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(
            f"{source}: {key} is {actual}, {name} has {tuple(expected.shape)} {expected.dtype}", ONE_RUN
        )
    # A mask of the model's own may hold infinities.
    if not is_finite(value) and not torch.equal(value, expected.to(value.dtype)):
        raise CheckpointError(f"{source}: {key} holds NaN or infinity", "give a checkpoint from a successful run")


def number_kind(value: Tensor) -> tuple[bool, bool]:
    """Return whether a tensor holds floats, and whether complex numbers; dtypes of one kind convert to one another."""
    return value.is_floating_point(), value.is_complex()


def compare_tied(source: Source, name: str, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where weights differ that are one in the model."""
    names = list(weights)
    for other in names[1:]:
        if not torch.equal(weights[names[0]], weights[other]):
            raise CheckpointError(f"{source}: {names[0]} and {other} differ, {name} has one weight for both", ONE_RUN)


def check_finite(source: Source, parameters: NamedTensors, buffers: NamedTensors) -> None:
    """Raise CheckpointError where parameters are not finite or buffers hold NaN: a mask may hold infinities."""
    broken = [name for name, value in parameters if not is_finite(value)]
    broken += [name for name, value in buffers if has_nan(value)]
    for name in broken[:1]:
        raise CheckpointError(f"{source}: {name[:200]} holds NaN or infinity", "give one from a successful run")


def ties(weights: Mapping[str, Tensor]) -> list[set[str]]:
    """Return the sets of names that stand for one and the same weight."""
    groups: dict[tuple[int, torch.Size, tuple[int, ...]], set[str]] = {}
    for key, value in weights.items():
        if value.numel():
            groups.setdefault((value.data_ptr(), value.shape, value.stride()), set()).add(key)
    return [keys for keys in groups.values() if len(keys) > 1]


def compare_unsaved(source: Source, name: str, module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a buffer that the model does not save has other values in the file."""
    state = module.state_dict()
    for key, buffer in module.named_buffers():
        value = weights.get(key)
        if key not in state and value is not None and not (isinstance(value, Tensor) and torch.equal(value, buffer)):
            raise CheckpointError(f"{source}: {key} is not what {name} has, which neither saves nor loads it", ONE_RUN)


def give_weights(source: Source, name: str, module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load weights into a model as its own strict `load_state_dict` does, and nothing else.

    Raises:
        CheckpointError: they are not the model's.
    """
    expected = module.state_dict()
    groups = ties({key: value for key, value in expected.items() if isinstance(value, Tensor)})
    unsaved = dict(module.named_buffers()).keys() - expected.keys()
    state = OrderedDict((key, value) for key, value in weights.items() if key not in unsaved)
    for keys in groups:
        present = sorted(keys & state.keys())
        state.update({key: state[present[0]] for key in keys - state.keys() if present})
    setattr(state, METADATA, getattr(weights, METADATA, None))
    # Before: afterwards, what is expected holds the weights of the file. Shapes are left to the model, and its hooks.
    for key, value in weights.items():
        if isinstance(value, Tensor) and isinstance(expected.get(key), Tensor) and value.shape == expected[key].shape:
            compare_weight(source, name, key, value, expected[key])
    try:
        module.load_state_dict(state)
    except Exception as error:  # of torch, or of the model's own hooks
        compare_weights(source, name, module, weights)  # says it in fewer words, where it can
        raise CheckpointError(f"{source}: {name} refuses its weights: {str(error).strip()[:300]}", ONE_RUN) from error
    compare_unsaved(source, name, module, weights)
    for keys in groups:
        compare_tied(source, name, {key: weights[key] for key in sorted(keys & weights.keys())})


def place_notes(best: Reading) -> Iterator[str]:
    """Yield notes on where the weights were found, unless that goes without saying."""
    if best.place:
        yield f"weights found at {best.place!r}"
    if best.removed:
        yield f"{' and '.join(map(repr, best.removed))} removed from their names"
    if best.left:
        yield f"left over: {first_of(best.left)}"


def dtype_notes(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on which dtypes were converted to which."""
    pairs = {(v.dtype, expected[k].dtype) for k, v in weights.items() if k in expected and isinstance(v, Tensor)}
    for old, new in sorted(pairs, key=str):
        if old != new:
            yield f"{str(old).removeprefix('torch.')} weights read as {str(new).removeprefix('torch.')}"
