"""From a file to a `Teacher`: the same steps for every command, every process of torchrun and every benchmark."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from asapc.backends.eager.runner import EagerRunner
from asapc.capturing.dynamic import at_longest, open_axes, parse_axes, reopen
from asapc.capturing.names import parse_names
from asapc.commands.lengths import check_lengths, find_at_lengths
from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.events import OnEvent, stage
from asapc.fidelity.outputs import check_labels
from asapc.loading.model import load_model
from asapc.loading.split import gather_samples
from asapc.passes.find.build import build_plans
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples
from asapc.types.teacher import Teacher
from asapc.writing.dump import Dump
from asapc.writing.origins import origin_of
from asapc.writing.report import early_stop_data, early_stop_note

Gather = Callable[[LoadedModel, CompileConfig], tuple[Samples, Samples]]


def study(
    model: str | Path | LoadedModel,
    config: CompileConfig | None = None,
    gather: Gather = gather_samples,
    on_event: OnEvent = lambda event: None,
    dump: Dump | None = None,
    notes: tuple[str, ...] = (),
) -> Teacher:
    """Load a model, gather its samples, capture it as a graph, build its plans and find its Sinkhorn loops.

    Args:
        model: its file, or the model where it is loaded.
        config: options; those of loading, samples, capture and open axes matter here.
        gather: gives calibration and held-out samples.
        on_event: called with progress.
        dump: writes the graph after capture, the graph with its plans built, and the findings.
        notes: what the caller has to say about the samples.

    Raises:
        AsapcError: the model, its samples or an option is at fault. Finding no loop is not an error.
    """
    config, dump = config or CompileConfig(), dump or Dump()
    output_names = parse_names(config.output_names)
    with stage("load", on_event) as step:
        loaded = model if isinstance(model, LoadedModel) else load_model(model, config)
        loaded = replace(loaded, output_names=output_names)
        calibration, held_out = gather(loaded, config)
        of_both = f"{len(calibration)} + {len(held_out)}" if held_out is not calibration else f"{len(calibration)}"
        counts = f"{loaded.parameters:,} parameters, {of_both} samples"
        casts = [f"{name} read as float32, not float64" for name in calibration.cast]
        step.summary = "; ".join((counts, *loaded.notes, *notes, *casts))

    with stage("capture", on_event) as step:
        origin = origin_of(loaded)
        config = origin.adapt(config)  # before any work is done for options that the format refuses
        graph = origin.capture(calibration, config.early_stop)
        dump.graph("capture", graph)
        check_labels(EagerRunner(graph.program.module()), calibration, held_out)
        axes = parse_axes(config.dynamic, calibration)
        note = early_stop_note(early_stop_data(graph.early_stops))
        parts = [f"{len(graph.program.graph.nodes)} nodes", *filter(None, [note])]
        if graph.departures:
            parts.append(f"without what leaves it at {', '.join(graph.departures)}")
        if graph.casts:
            parts.append(f"captured without the automatic casts of {', '.join(graph.casts)}")
        step.summary = ", ".join(parts)

    with stage("find", on_event) as step:
        # The finder looks for plans, so that those which the code applies without building them come first.
        graph = build_plans(graph, calibration)
        findings = find_at_lengths(loaded, calibration, axes, graph, config.early_stop)
        findings = replace(findings, early_stops=graph.early_stops)
        dump.graph("build-plans", graph)
        dump.findings("find", findings)
        step.summary = f"{len(findings.sites)} Sinkhorn site{'s' * (len(findings.sites) != 1)}"
        # Sites are recognised with fixed lengths, since shapes that are numbers tell axes apart, then located by place.
        open_graph, open_sites = graph, list(findings.sites)
        is_open = bool(findings.sites and open_axes(axes, calibration))
        if is_open:
            open_graph, open_sites = reopen(loaded, calibration, axes, graph, findings.sites, config.early_stop)
        longest_sites = [at_longest(site, axes, calibration) for site in findings.sites]
        teacher = Teacher(loaded, calibration, held_out, graph, findings, open_graph, open_sites, longest_sites)
        if is_open:
            check_lengths(teacher, axes)
    return teacher


def study_module(
    module: nn.Module,
    calibration: Samples,
    held_out: Samples | None = None,
    config: CompileConfig | None = None,
    on_event: OnEvent = lambda event: None,
) -> Teacher:
    """Study a module that is in memory; see `study`.

    Args:
        module: the model; it is put into evaluation mode.
        calibration: samples for fitting.
        held_out: samples to check on; None for those of calibration, where nothing is fitted.
        config: options.
        on_event: called with progress.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters())
    loaded = LoadedModel(module.eval(), Path("module"), "", parameters, None, None)
    return study(loaded, config, lambda loaded, config: (calibration, held_out or calibration), on_event)


@contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """Set torch's thread count (0 keeps the current one) and yield it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def check_callback(on_event: OnEvent) -> None:
    """Raise OptionError unless progress can be told."""
    if not callable(on_event):
        raise OptionError(f"on_event cannot be {on_event!r}", "give a function of one argument, asapc.events.Event")
