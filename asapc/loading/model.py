"""Reads models from files, without ever running code that they hold; only `--unsafe-load` does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asapc.config import CompileConfig, options_of
from asapc.errors import CheckpointError, OptionError, one_line
from asapc.loading.checkpoint import FORMAT, build_checkpoint, checkpoint_samples
from asapc.loading.described import build_described
from asapc.loading.factories import build_model, call_of, working_directory_importable
from asapc.loading.hub import is_hub, read_hub
from asapc.loading.lines import told
from asapc.loading.onnx.module import load_onnx
from asapc.loading.pt2.program import load_program
from asapc.loading.samples import draw_inputs, load_samples
from asapc.loading.untrusted.files import detect
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_safetensors, read_torch_parts
from asapc.loading.weights import MAX_WRAPPERS, check_finite, first_of, load_weights, tensor_mappings
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        value: tensors, numbers, strings and containers of them; anything where code ran.
        unread: names of the classes and functions of what else it holds, for which nothing was run.
        ran: whether code in it was run.
    """

    value: Any
    unread: tuple[str, ...] = ()
    ran: bool = False

    @property
    def notes(self) -> Iterator[str]:
        """Say what the user has to know about how the file was read."""
        if self.ran:
            yield "code in the file was run"
        if self.unread:
            yield f"not read, for that would run code: {first_of(self.unread)}"

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Add to a refusal that the file holds what was not read."""
        try:
            yield
        except CheckpointError as error:
            if not self.unread:
                raise
            unsafe = f"of {first_of(self.unread)} nothing was read; --unsafe-load would run the file as a program"
            raise CheckpointError(str(error), f"{error.hint}; {unsafe}") from None


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
    path, config = as_path(path), options_of(config)
    example = example_inputs(config)
    loaded = load_folder(path, config) if is_hub(path) else load_file(path, config)
    return loaded if example is None else replace(loaded, example=example)


def as_path(path: str | Path) -> Path:
    """Return the path of a model's file; raise OptionError if it is anything else."""
    if not isinstance(path, str | Path):
        raise OptionError(f"this takes the path of a file, not a {type(path).__name__}", "give a str or pathlib.Path")
    return Path(path)


def load_folder(path: Path, config: CompileConfig) -> LoadedModel:
    """Read a model from the files of a folder, built as its config.json describes it unless the options say how."""
    folder, weights = read_hub(path)
    place = path if path.is_dir() else path.parent
    described = None if config.model is not None else build_described(place, weights)
    return load_content(folder, Content(weights), config, described)


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
            return load_content(source, Content(read_safetensors(source)), config)
        case _:
            return load_content(source, read_content(source, config), config)


def example_inputs(config: CompileConfig) -> Samples | None:
    """Read or draw the inputs that the options name for capturing a model, None where they name none."""
    if config.inputs is not None and config.input_shape:
        raise OptionError("there are both example inputs and input shapes", "give either --inputs or --input-shape")
    if config.inputs is not None:
        return load_samples(Path(config.inputs))
    return draw_inputs(config.input_shape, config.seed) if config.input_shape else None


def read_content(source: Source, config: CompileConfig) -> Content:
    """Read a file of torch.save; one with Python objects as a program where the options say so."""
    with source.path.open("rb") as file:
        value, unread = read_torch_parts(file, source)
    if unread and config.unsafe_load:
        return Content(run_file(source), ran=True)
    if unread and next(tensor_mappings(value), None) is None:
        raise CheckpointError(
            str(source.would_run(unread[0])),
            "save model.state_dict() instead, or add --unsafe-load if you would run this file as a program",
        )
    return Content(value, unread)


def run_file(source: Source) -> Any:
    """Load a file of torch.save as a program, which may import and call anything.

    Raises:
        CheckpointError: it fails, for one because the classes that it names are not where they were.
    """
    try:
        with working_directory_importable():
            return torch.load(source.path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise source.refuse(
            f"it names what cannot be imported here: {one_line(error)}",
            "run asapc where that module can be imported, as it was when the file was saved; a class of a script "
            "(__main__) has to move into a module; or save model.state_dict() and give --model",
        ) from error
    except Exception as error:
        raise source.refuse(f"run as a program, it raises {told(error)}", "save model.state_dict() instead") from error


def load_content(
    source: Source, content: Content, config: CompileConfig, described: tuple[str, nn.Module] | None = None
) -> LoadedModel:
    """Load a model from a file's content: a checkpoint of `asapc train`, weights, or where code ran a whole module.

    Args:
        source: the file.
        content: what it holds.
        config: options; the model that they name is built.
        described: a model that is built already, with its name.
    """
    value, notes = content.value, list(content.notes)
    calibration = held_out = call = None
    if isinstance(value, Mapping) and value.get("format") == FORMAT:
        calibration, held_out = (checkpoint_samples(source, value, key) for key in ("calibration", "held_out"))
    if config.model is not None:
        described = config.model, unwrapped(build_model(config.model, config.model_args))
        call = call_of(config.model, config.model_args)
    if described is not None:
        name, module = described
        with content.explaining():
            notes += load_weights(source, name, module, value, config.weights)
    elif isinstance(value, Mapping) and value.get("format") == FORMAT:
        module = build_checkpoint(source, value)
        call = call_of(value["model"], value["model_args"])
    elif match := next(find_modules(value), None):
        place, module = match
        check_finite(source, module.named_parameters(), module.named_buffers())
        notes.append(f"a pickled {type(module).__name__}" + (f" found at {place!r}" if place else ""))
    else:
        with content.explaining():
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
        call=call,
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
    elif isinstance(content, Mapping) and depth < MAX_WRAPPERS:
        for key, value in content.items():
            yield from find_modules(value, f"{place}.{key}" if place else str(key), depth + 1)
