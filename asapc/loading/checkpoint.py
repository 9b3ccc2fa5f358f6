"""Reads checkpoints of `asapc train`: a model by the name of its class, and its samples."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from asapc.errors import CheckpointError, SamplesError, first_line
from asapc.loading.samples import as_samples
from asapc.loading.weights import give_weights
from asapc.types.samples import Samples

FORMAT = "asapc.checkpoint/1"
# A checkpoint names the class that builds its model. Only these are followed: a name in a file must not be able
# to call anything that happens to be importable.
TRUSTED = "asapc.models."
RETRAIN = "train it again with `asapc train`, or give an intact copy"


def checkpoint_samples(path: Path, content: Mapping[str, Any], key: str) -> Samples | None:
    """Samples that a checkpoint of `asapc train` carries under a key."""
    if content.get(key) is None:
        return None
    try:
        return as_samples(content[key], f"{key} in {path}")
    except SamplesError as error:
        raise CheckpointError(str(error), RETRAIN) from None


def build_checkpoint(path: Path, content: Mapping[str, Any]) -> nn.Module:
    """Build the model that a checkpoint of `asapc train` names and give it the checkpoint's weights."""
    args, weights, name = content.get("model_args"), content.get("state_dict"), str(content.get("model"))
    if not isinstance(args, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} lacks the model's arguments or its weights", RETRAIN)
    model_class = find_class(path, name)
    held = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    try:
        # First without memory: the arguments may ask for more than the weights that came with them can fill.
        with torch.device("meta"), at_most(2 * len(weights) + 100):
            size = sum(value.numel() for value in model_class(**args).state_dict().values())
        module = model_class(**args) if size <= 2 * held + 10**6 else None
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        why = f"cannot build {name} with {str(dict(args))[:200]}: {first_line(error)}"
        raise CheckpointError(f"{path}: {why}", RETRAIN) from error
    if module is None:
        raise CheckpointError(f"{path} names a model of {size:,} weights, and holds {held:,}", RETRAIN)
    give_weights(path, name, module, weights)
    return module


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Raise ValueError where a model registers more than so many parameters."""
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


def find_class(path: Path, name: str) -> type[nn.Module]:
    """Return the model class that a checkpoint names as "module:class", if it is one of asapc's own."""
    refusal = CheckpointError(
        f"{path} names the model {name[:200]!r}; a name in a file is followed to the models of {TRUSTED}* only",
        RETRAIN,
    )
    if not name.startswith(TRUSTED) or name.count(":") != 1:
        raise refusal
    module_name, class_name = name.split(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        raise refusal from None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(TRUSTED)):
        raise refusal
    return found
