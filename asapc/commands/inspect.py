"""`asapc inspect`: the Sinkhorn loops of a model, without compiling it."""

from pathlib import Path
from typing import Any

from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.errors import NoSinkhornError
from asapc.events import OnEvent
from asapc.loading.folder import REPORT, read_folder
from asapc.loading.manifest import MANIFEST
from asapc.loading.split import probe_samples
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples
from asapc.types.site import Findings
from asapc.writing.report import shorten


def inspect_model(
    path: str | Path, config: CompileConfig | None = None, on_event: OnEvent = lambda event: None
) -> Findings:
    """Find the Sinkhorn attention of a checkpoint without compiling it.

    Example inputs, even random ones, can replace samples: they do not change which loops there are.

    Raises:
        AsapcError: the checkpoint or the samples are at fault. Finding nothing is no error.
    """
    config = config or CompileConfig()
    drawn = bool(config.input_shape) and config.calib is None
    notes = (f"probed with random inputs, seed {config.seed}",) if drawn else ()
    return study(path, config, example_samples, on_event, notes=notes).findings


def is_compiled(path: Path) -> bool:
    """Return whether a path is a folder that `asapc compile` wrote, be it without its manifest by now."""
    return any((path / name).is_file() for name in (MANIFEST, REPORT))


def inspect_folder(folder: Path) -> dict[str, Any]:
    """Return the report of a compiled folder, after checking that its files are those that were written.

    Raises:
        CheckpointError: they are not.
    """
    return read_folder(folder)


def example_samples(loaded: LoadedModel, config: CompileConfig) -> tuple[Samples, Samples]:
    """Gather inputs to study a model with; nothing is fitted, so that none have to be held out."""
    samples = probe_samples(loaded, config)
    return samples, samples


def require_sites(findings: Findings, path: Path, shows_misses: bool = False) -> None:
    """Raise NoSinkhornError if there are no sites, quoting the nearest miss.

    Args:
        findings: sites and misses.
        path: the model, as the user named it.
        shows_misses: whether the command shows the misses itself.
    """
    if findings.sites:
        return
    message = "no Sinkhorn attention was found in the model"
    if not findings.misses:
        raise NoSinkhornError(
            message, "nothing in it looks like attention; asapc compiles Sinkhorn loops and no others"
        )
    miss = findings.misses[0]
    see_all = f"run `asapc inspect {path} --why` to see all that came near, and what can be done"
    raise NoSinkhornError(
        f"{message}; {shorten(miss.source) or miss.node}: {miss.reason}", miss.hint if shows_misses else see_all
    )
