"""Reads models from files, without ever running code that they hold; only `--unsafe-load` does."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asapc.config import CompileConfig
from asapc.errors import CheckpointError, OptionError
from asapc.loading.checkpoint import FORMAT, build_checkpoint, checkpoint_samples
from asapc.loading.factories import build_model, working_directory_importable
from asapc.loading.hub import is_hub, read_hub
from asapc.loading.onnx.module import load_onnx
from asapc.loading.pt2.program import load_program
from asapc.loading.samples import draw_inputs, load_samples
from asapc.loading.untrusted.files import detect
from asapc.loading.untrusted.source import RUNS_CODE, Source
from asapc.loading.untrusted.tensors import read_safetensors, read_torch
from asapc.loading.weights import check_finite, load_weights
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples


def load_model(path: str | Path, config: CompileConfig | None = None) -> LoadedModel:
    """Read a model: a checkpoint of `asapc train`, weights with `CompileConfig.model`, a torch.export archive, or ONNX.

    Args:
        path: the file; of weights also a folder of Hugging Face's libraries, or an index of shards.
        config: options; those that say how to read the file are `model`, `model_args`, `weights`, `inputs`,
            `input_shape` and `unsafe_load`.

    Raises:
        CheckpointError: the file is missing, truncated, of an unknown format, would run code, or its weights are not
            those of the model.
        OptionError: the model cannot be built, or the options contradict each other.
        SamplesError: the example inputs cannot be read.
    """
    config = config or CompileConfig()
    example = example_inputs(config)
    path = Path(path)
    loaded = load_content(*read_hub(path), False, config) if is_hub(path) else load_file(path, config)
    return loaded if example is None else replace(loaded, example=example)


def load_file(path: Path, config: CompileConfig) -> LoadedModel:
    """Read a model from one file, by its format."""
    source = Source.at(path, CheckpointError)
    match detect(source):
        case "exported" | "onnx" if config.model:
            raise OptionError(f"{source} holds a graph and needs no model", "omit --model")
        case "exported":
            return load_program(source)
        case "onnx":
            return load_onnx(source)
        case "torchscript":
            raise CheckpointError(
                f"{source} is a TorchScript archive, whose graph asapc does not read",
                "give its weights (module.state_dict()) with --model, or a torch.export archive",
            )
        case "safetensors":
            return load_content(source, read_safetensors(source.path, CheckpointError), False, config)
        case _:
            return load_content(source, *read_content(source, config), config)


def example_inputs(config: CompileConfig) -> Samples | None:
    """Read or draw the inputs that the options name for capturing a model, None where they name none."""
    if config.inputs is not None and config.input_shape:
        raise OptionError("there are both example inputs and input shapes", "give either --inputs or --input-shape")
    if config.inputs is not None:
        return load_samples(Path(config.inputs))
    return draw_inputs(config.input_shape, config.seed) if config.input_shape else None


def read_content(source: Source, config: CompileConfig) -> tuple[Any, bool]:
    """Read a file of torch.save, and say whether code in it was run to do so."""
    try:
        return read_torch(source), False
    except CheckpointError as error:
        if RUNS_CODE not in str(error):
            raise
        if not config.unsafe_load:
            raise CheckpointError(
                str(error),
                "save model.state_dict() instead, or add --unsafe-load if you would run this file as a program",
            ) from None
    with source.reading(), working_directory_importable():
        return torch.load(source.path, map_location="cpu", weights_only=False), True


def load_content(source: Source, content: Any, unsafe: bool, config: CompileConfig) -> LoadedModel:
    """Load a model from a file's content: a checkpoint of `asapc train`, weights, or with `unsafe` a whole module."""
    notes = ["code in the file was run"] if unsafe else []
    calibration = held_out = None
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        calibration, held_out = (checkpoint_samples(source, content, key) for key in ("calibration", "held_out"))
    if config.model is not None:
        module = unwrapped(build_model(config.model, config.model_args))
        notes += load_weights(source, config.model, module, content, config.weights)
    elif isinstance(content, Mapping) and content.get("format") == FORMAT:
        module = build_checkpoint(source, content)
    elif match := next(find_modules(content), None):
        place, module = match
        check_finite(source, module.named_parameters(), module.named_buffers())
        notes.append(f"a pickled {type(module).__name__}" + (f" found at {place!r}" if place else ""))
    else:
        raise CheckpointError(
            f"{source} is not an asapc checkpoint and does not say which model it belongs to",
            "name the class or function that builds the model: --model package.module:factory",
        )
    return LoadedModel(
        module=module.eval(),
        path=source.path,
        sha256=source.sha256,
        parameters=sum(p.numel() for p in module.parameters()),
        calibration=calibration,
        held_out=held_out,
        notes=tuple(notes),
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile and the data-parallel wrappers return."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    while (inner := getattr(module, "module" if isinstance(module, wrappers) else "_orig_mod", None)) is not None:
        module = inner
    return module


def find_modules(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in nested mappings, each with the keys that lead to it."""
    if isinstance(content, nn.Module):
        yield place, content
    elif isinstance(content, Mapping) and depth < 4:
        for key, value in content.items():
            yield from find_modules(value, f"{place}.{key}" if place else str(key), depth + 1)
