"""Reads checkpoints of `asapc train`: a model by the name of its class, and its samples."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from asapc.errors import CheckpointError, SamplesError, one_line
from asapc.loading.samples import as_samples
from asapc.loading.untrusted.source import Source
from asapc.loading.weights import give_weights
from asapc.types.samples import Samples

FORMAT = "asapc.checkpoint/1"
# A checkpoint names the class that builds its model. Only names that begin like this are followed: a name in a file
# must not be able to call anything that happens to be importable.
TRUSTED = "asapc.models."
RETRAIN = "train it again with `asapc train`, or give an intact copy"


def checkpoint_samples(source: Source, content: Mapping[str, Any], key: str) -> Samples | None:
    """Read the samples that a checkpoint of `asapc train` carries under a key, None where it carries none."""
    if content.get(key) is None:
        return None
    try:
        return as_samples(content[key], f"{key} in {source}")
    except SamplesError as error:
        raise CheckpointError(str(error), RETRAIN) from None


def build_checkpoint(source: Source, content: Mapping[str, Any]) -> nn.Module:
    """Build the model that a checkpoint of `asapc train` names and give it the checkpoint's weights."""
    args, weights, name = content.get("model_args"), content.get("state_dict"), str(content.get("model"))
    if not isinstance(args, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(f"{source} lacks the model's arguments or its weights", RETRAIN)
    model_class = find_class(source, name)
    stored = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    try:
        # First without memory: the arguments may ask for more weights than the checkpoint holds.
        with torch.device("meta"), at_most(2 * len(weights) + 100):
            size = sum(value.numel() for value in model_class(**args).state_dict().values())
        module = model_class(**args) if size <= 2 * stored + 10**6 else None
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        why = f"cannot build {name} with {str(dict(args))[:200]}: {one_line(error)}"
        raise CheckpointError(f"{source}: {why}", RETRAIN) from error
    if module is None:
        raise CheckpointError(f"{source} names a model of {size:,} weights, and holds {stored:,}", RETRAIN)
    give_weights(source, name, module, weights)
    return module


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Raise ValueError where a model registers more than `count` parameters."""
    registered = 0

    def register(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal registered
        registered += 1
        if registered > count:
            raise ValueError(f"it has more than {count} weights")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def find_class(source: Source, name: str) -> type[nn.Module]:
    """Return the model class that a checkpoint names as "module:class", if it is one of asapc's own."""
    refusal = CheckpointError(
        f"{source} names the model {name[:200]!r}; a file may only name the models in {TRUSTED}*",
        RETRAIN,
    )
    if not name.startswith(TRUSTED) or name.count(":") != 1:
        raise refusal
    module_name, class_name = name.split(":")
    try:
        named = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        raise refusal from None
    if not (isinstance(named, type) and issubclass(named, nn.Module) and named.__module__.startswith(TRUSTED)):
        raise refusal
    return named
