"""Reads models from files, without ever running code that they hold; only `--unsafe-load` does."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from asapc.archives import RUNS_CODE, detect, sha256
from asapc.artifacts import LoadedModel, Samples
from asapc.config import CompileConfig
from asapc.errors import CheckpointError, OptionError, SamplesError, first_line
from asapc.exported import load_program
from asapc.factories import build_model, working_directory_importable
from asapc.onnx_import import load_onnx
from asapc.samples import as_samples, draw_inputs, load_samples
from asapc.tensors import damage, read_safetensors, read_torch
from asapc.weights import check_finite, give_weights, load_weights

FORMAT = "asapc.checkpoint/1"
# A checkpoint names the class that builds its model. Only these are followed: a name in a file must not be able
# to call anything that happens to be importable.
TRUSTED = "asapc.models."
RETRAIN = "train it again with `asapc train`, or give an intact copy"


def load_model(path: str | Path, config: CompileConfig | None = None) -> LoadedModel:
    """Read a model: a checkpoint of `asapc train`, weights with `config.model`, a torch.export archive, or ONNX.

    Args:
        path: the file.
        config: options; those that say how to read the file are `model`, `model_args`, `inputs`, `input_shape` and
            `unsafe_load`.

    Raises:
        CheckpointError: the file is missing, of no known format, truncated, would run code, or its weights are not
            those of the model.
        OptionError: the model cannot be built, or the options contradict each other.
        SamplesError: the example inputs cannot be read.
    """
    path, config = Path(path), config or CompileConfig()
    example = example_inputs(config)
    match detect(path):
        case "exported":
            if config.model:
                raise OptionError(f"{path} holds a graph and needs no model", "leave out --model")
            loaded = load_program(path)
        case "onnx":
            if config.model:
                raise OptionError(f"{path} holds a graph and needs no model", "leave out --model")
            loaded = load_onnx(path)
        case "torchscript":
            raise CheckpointError(
                f"{path} is a TorchScript archive, whose graph asapc does not read",
                "give its weights (module.state_dict()) with --model, or a torch.export archive",
            )
        case "safetensors":
            loaded = load_content(path, read_safetensors(path, CheckpointError), False, config)
        case _:
            loaded = load_content(path, *read_content(path, config), config)
    return loaded if example is None else replace(loaded, example=example)


def example_inputs(config: CompileConfig) -> Samples | None:
    """The inputs that the options give for capturing a model, None where they give none."""
    if config.inputs is not None and config.input_shape:
        raise OptionError("there are both example inputs and input shapes", "give --inputs or --input-shape")
    if config.inputs is not None:
        return load_samples(Path(config.inputs))
    return draw_inputs(config.input_shape, config.seed) if config.input_shape else None


def read_content(path: Path, config: CompileConfig) -> tuple[Any, bool]:
    """What a file of torch.save holds, and whether code in it was run to get at it."""
    try:
        return read_torch(path, CheckpointError), False
    except CheckpointError as error:
        if RUNS_CODE not in str(error):
            raise
        if not config.unsafe_load:
            raise CheckpointError(
                str(error),
                "save model.state_dict() instead, or add --unsafe-load if you would run this file as a program",
            ) from None
    with damage(path, CheckpointError), working_directory_importable():
        return torch.load(path, map_location="cpu", weights_only=False), True


def load_content(path: Path, content: Any, unsafe: bool, config: CompileConfig) -> LoadedModel:
    """Make a model of what a file holds: a checkpoint of `asapc train`, weights, or with `unsafe` a whole module."""
    notes = ["code in the file was run"] if unsafe else []
    calibration = held_out = None
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        calibration, held_out = (checkpoint_samples(path, content, key) for key in ("calibration", "held_out"))
    if config.model is not None:
        module = build_model(config.model, config.model_args)
        notes += load_weights(path, config.model, module, content)
    elif isinstance(content, Mapping) and content.get("format") == FORMAT:
        module = build_checkpoint(path, content)
    elif found := next(find_modules(content), None):
        place, module = found
        check_finite(path, module.named_parameters(), module.named_buffers())
        notes.append(f"a pickled {type(module).__name__}" + (f" found at {place!r}" if place else ""))
    else:
        raise CheckpointError(
            f"{path} is not an asapc checkpoint and does not say which model it is of",
            "name the class or function that builds the model: --model package.module:factory",
        )
    return LoadedModel(
        module=module.eval(),
        path=path,
        sha256=sha256(path),
        parameters=sum(p.numel() for p in module.parameters()),
        calibration=calibration,
        held_out=held_out,
        notes=tuple(notes),
    )


def find_modules(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """The modules in nested mappings, each with the keys that lead to it."""
    if isinstance(content, nn.Module):
        yield place, content
    elif isinstance(content, Mapping) and depth < 4:
        for key, value in content.items():
            yield from find_modules(value, f"{place}.{key}" if place else str(key), depth + 1)


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
