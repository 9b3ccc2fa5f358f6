"""Finds a model's weights in a checkpoint's content, by structure, and loads them into the model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asapc.errors import CheckpointError
from asapc.loading.samples import has_nan, is_finite
from asapc.loading.untrusted.source import Source

NamedTensors = Iterable[tuple[str, Tensor]]
ONE_RUN = "the weights and the model's arguments must be from the same training run"
COMPILED = "_orig_mod."  # of torch.compile
MAX_DEPTH = 4  # {"model": {...}}, and what trainers put around that


class Candidate(NamedTuple):
    """A mapping of tensors in a file.

    Attributes:
        place: the keys that lead to it, "" for the file itself.
        removed: what was removed from the names of its tensors.
        weights: the tensors, by the names that remain.
    """

    place: str
    removed: tuple[str, ...]
    weights: Mapping[str, Any]


def load_weights(source: Source, name: str, module: nn.Module, content: Any) -> list[str]:
    """Find the weights of a model in a file's content, compare them with the model, and load them into it.

    Args:
        source: the file, for messages.
        name: of the model, for messages.
        module: the model.
        content: of the file: nested mappings, one of which holds the weights.

    Returns:
        Notes for the user: where the weights were found, and what was done to them.

    Raises:
        CheckpointError: there are none, or they do not fit.
    """
    expected = module.state_dict()
    candidates = [strip(place, weights, expected) for place, weights in tensor_mappings(content)]
    if not candidates:
        raise CheckpointError(f"{source} holds no weights", "save model.state_dict()")
    best = max(candidates, key=lambda candidate: shared(candidate.weights, expected))
    most = shared(best.weights, expected)
    rivals = [c.place for c in candidates if c is not best and shared(c.weights, expected) == most]
    give_weights(source, name, module, best.weights)
    return [*place_notes(best, rivals), *dtype_notes(best.weights, expected)]


def tensor_mappings(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the mappings in nested mappings that hold tensors by name, outer ones first."""
    if not isinstance(content, Mapping) or depth > MAX_DEPTH:
        return
    if any(isinstance(value, Tensor) and isinstance(key, str) for key, value in content.items()):
        yield place, content
    for key, value in content.items():
        if isinstance(key, str):
            yield from tensor_mappings(value, f"{place}.{key}" if place else key, depth + 1)


def strip(place: str, weights: Mapping[str, Any], expected: Mapping[str, Any]) -> Candidate:
    """Remove from the names of weights what wrappers put there.

    torch.compile puts "_orig_mod." somewhere, DataParallel "module." and trainers the name of their attribute at the
    front of all; averaging adds a counter.
    """
    named = {key.replace(COMPILED, ""): value for key, value in weights.items() if isinstance(key, str)}
    if len(named) < len(weights):  # two names became one, or a name is not a string: the comparison names it
        return Candidate(place, (), weights)
    if "n_averaged" not in expected:
        named.pop("n_averaged", None)
    removed = (COMPILED,) if named.keys() - weights.keys() else ()
    best, prefix = Candidate(place, removed, named), ""
    for part in next(iter(named), "").split(".")[:-1]:
        prefix += f"{part}."
        if not all(key.startswith(prefix) for key in named):
            break
        shorter = {key.removeprefix(prefix): value for key, value in named.items()}
        if shared(shorter, expected) > shared(best.weights, expected):
            best = Candidate(place, (*removed, prefix), shorter)
    return best


def shared(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    """Count the weights that fit a model's by name and shape."""
    fitting = (key for key, value in weights.items() if key in expected and isinstance(value, Tensor))
    return sum(isinstance(expected[key], Tensor) and expected[key].shape == weights[key].shape for key in fitting)


def compare_weights(source: Source, name: str, module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the first offender, unless the weights are those of the model, and finite.

    A tied weight may come under one of its names only, and a buffer that the model does not save may come too.
    """
    state = module.state_dict()
    expected = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    groups = ties(expected)
    tied = {key for keys in groups if keys & weights.keys() for key in keys}
    missing = expected.keys() - weights.keys() - tied
    unknown = weights.keys() - state.keys() - dict(module.named_buffers()).keys()
    for problem, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            raise CheckpointError(f"{source} {problem} weights of {name}: {first_of(keys)}", ONE_RUN)
    for key, value in weights.items():
        if key in expected:
            compare_weight(source, name, key, value, expected[key])
    for keys in groups:
        compare_tied(source, name, {key: weights[key] for key in sorted(keys & weights.keys())})


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
    """Say whether a tensor holds floats, and whether complex numbers; dtypes of one kind convert to one another."""
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


def give_weights(source: Source, name: str, module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load the weights into a model, and nothing else.

    Raises:
        CheckpointError: they are not the model's.
    """
    compare_weights(source, name, module, weights)
    expected = module.state_dict()
    try:
        # Not strict, since a tied weight need only come under one of its names.
        module.load_state_dict({key: value for key, value in weights.items() if key in expected}, strict=False)
    except Exception as error:  # of the model's own hooks
        raise CheckpointError(f"{source}: {name} refuses its weights: {str(error).strip()[:300]}", ONE_RUN) from error


def place_notes(best: Candidate, rivals: list[str]) -> Iterator[str]:
    """Say where the weights were found, unless that goes without saying."""
    if best.place:
        yield f"weights found at {best.place!r}"
    if best.removed:
        yield f"{' and '.join(map(repr, best.removed))} removed from their names"
    if rivals:
        yield f"those at {', '.join(map(repr, rivals))} would fit too"


def dtype_notes(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Say which dtypes were converted to which."""
    pairs = {(v.dtype, expected[k].dtype) for k, v in weights.items() if k in expected and isinstance(v, Tensor)}
    for old, new in sorted(pairs, key=str):
        if old != new:
            yield f"{str(old).removeprefix('torch.')} weights read as {str(new).removeprefix('torch.')}"
