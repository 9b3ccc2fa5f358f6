"""`asapc inspect`: the Sinkhorn loops of a model, without compiling it."""

from pathlib import Path

from asapc.capturing.capture import capture
from asapc.commands.teacher import find
from asapc.config import CompileConfig
from asapc.errors import NoSinkhornError
from asapc.events import OnEvent, stage
from asapc.loading.model import load_model
from asapc.loading.split import probe_samples
from asapc.passes.find.build import build_plans
from asapc.types.site import Findings
from asapc.writing.report import shorten


def inspect_model(
    path: str | Path, config: CompileConfig | None = None, on_event: OnEvent = lambda event: None
) -> Findings:
    """Find the Sinkhorn attention of a checkpoint without compiling it.

    Where there are no samples, example inputs do, random ones too: what is found does not depend on them.

    Raises:
        AsapcError: the checkpoint or the samples are at fault. Finding nothing is no error.
    """
    config = config or CompileConfig()
    with stage("load", on_event) as step:
        loaded = load_model(path, config)
        samples = probe_samples(loaded, config)
        step.summary = "; ".join((f"{loaded.parameters:,} parameters", *loaded.notes))
        if config.input_shape and config.calib is None:
            step.summary += f"; probed with random inputs, seed {config.seed}"
    graph = build_plans(capture(loaded, samples, config.early_stop), samples)
    return find(graph, samples)


def require_sites(findings: Findings, path: Path, listed: bool = False) -> None:
    """Raise NoSinkhornError if nothing was found, with a miss where there is one.

    Args:
        findings: what was found.
        path: the model, as the user named it.
        listed: whether the misses were shown already.
    """
    if findings.sites:
        return
    message = "no Sinkhorn attention was found in the model"
    if not findings.misses:
        raise NoSinkhornError(
            message, "nothing in it looks like attention; asapc compiles Sinkhorn loops and no others"
        )
    miss = findings.misses[0]
    raise NoSinkhornError(
        f"{message}; {shorten(miss.source) or miss.node}: {miss.reason}",
        miss.hint if listed else f"run `asapc inspect {path} --why` to see all that came near, and what can be done",
    )
