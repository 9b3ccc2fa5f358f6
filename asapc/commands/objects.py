"""What Python calls: models and samples as objects or as files, options as keywords."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from asapc.commands.compile import compile_model
from asapc.commands.study import Gather, check_callback
from asapc.config import OPTIONS, CompileConfig, options_of
from asapc.errors import OptionError, SamplesError
from asapc.events import Event, OnEvent
from asapc.loading.objects import load_object, read_samples
from asapc.loading.split import gather_samples, split_samples
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples
from asapc.writing.report import CompileReport

MAX_SAMPLES = 1024
# Options that say how to read a file.
OF_FILES = ("model", "model_args", "weights", "inputs", "input_shape", "unsafe_load")


def silent(event: Event) -> None:
    """Say nothing of progress."""


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a call, in the form in which commands take them.

    Attributes:
        model: the path of a file, or the model where it is loaded.
        config: options.
        gather: gives calibration and held-out samples.
    """

    model: Path | LoadedModel
    config: CompileConfig
    gather: Gather


def read_call(
    model: str | Path | nn.Module,
    samples: Any,
    config: CompileConfig | None,
    options: dict[str, Any],
    most: int,
    on_event: OnEvent,
) -> Call:
    """Bring the arguments of a call into the form in which commands take them.

    Raises:
        OptionError: an option has no such name or value, does not go with the others, or the model is no model.
        CheckpointError: the module has no weights that can be copied.
        SamplesError: there are none for a module.
    """
    config = read_options(config, options)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise OptionError(f"max_samples cannot be {most!r}", "give a whole number of at least 1")
    check_callback(on_event)
    if samples is not None and config.calib is not None:
        raise OptionError("there are both samples and calib", "give one of the two")
    is_path = isinstance(model, str | Path)
    loaded: Path | LoadedModel = Path(model) if isinstance(model, str | Path) else load_object(model)
    if not is_path:
        of_files = [name for name in OF_FILES if getattr(config, name) != OPTIONS[name].default]
        if of_files:
            raise OptionError(f"{', '.join(of_files)} say how to read a file, and the model is an object", "omit them")
        if samples is None and config.calib is None:
            raise SamplesError("there are no samples", "give real inputs as samples; asapc never makes up random ones")

    def gather(loaded: LoadedModel, config: CompileConfig) -> tuple[Samples, Samples]:
        if samples is None:
            return gather_samples(loaded, config)
        return split_samples(loaded, read_samples(samples, loaded, most), "the samples", config.seed)

    return Call(loaded, config, gather)


def read_options(config: CompileConfig | None, options: dict[str, Any]) -> CompileConfig:
    """Return options, those given as keywords in place of those of `config`.

    Raises:
        OptionError: one has no such name or value.
    """
    for name in options:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, 1)
            meant = f"do you mean {near[0]}? " if near else ""
            raise OptionError(f"there is no option {name!r}", f"{meant}options are {', '.join(OPTIONS)}")
    return replace(options_of(config), **options)


def compile(
    model: str | Path | nn.Module,
    /,
    samples: Any = None,
    *,
    config: CompileConfig | None = None,
    on_event: OnEvent = silent,
    max_samples: int = MAX_SAMPLES,
    **options: Any,
) -> CompileReport:
    """Compile a model: find its Sinkhorn attention, replace it, export, build, verify and measure.

    Args:
        model: a module, which stays as it is, or the path of a file.
        samples: real inputs, of which a quarter is held out. A tensor or array for a model of one input; a tuple of
            them in the order of the forward's parameters; a dict by their names, and `labels`; an iterable of such
            batches, as a DataLoader, or of (inputs, labels); the path of a file. None for those of the checkpoint.
        config: options; None for the defaults.
        on_event: called with progress, see `asapc.events`.
        max_samples: how many to read from an iterable.
        **options: options of `CompileConfig` by their names, in place of those of `config`.

    Returns:
        The report; the artefacts lie in `report.folder`.

    Raises:
        AsapcError: the input is at fault or the fidelity budget is missed. Nothing is written then.
    """
    call = read_call(model, samples, config, options, max_samples, on_event)
    return compile_model(call.model, call.config, on_event, call.gather)
