"""The line from a checkpoint to its compiled form: each step one stage, in the order in which they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from asapc.backends.base import Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.backends.tensorrt.builder import build_engine
from asapc.capturing.capture import capture
from asapc.capturing.dynamic import at_longest, opens, parse_axes, reopen
from asapc.capturing.onnx import OnnxGraph
from asapc.commands.inspect import require_sites
from asapc.commands.teacher import find
from asapc.config import CompileConfig
from asapc.errors import OptionError
from asapc.events import OnEvent, stage
from asapc.fidelity.budget import check_budget
from asapc.fidelity.latency import measure
from asapc.fidelity.outputs import check_labels, verify
from asapc.fidelity.sites import site_fidelity
from asapc.loading.model import load_model
from asapc.loading.split import gather_samples
from asapc.passes.find.build import build_plans
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.choose import plan
from asapc.planning.costs import share_of_exact
from asapc.planning.operators import operators, rivals
from asapc.relu.stand_ins import fit_activations
from asapc.types.results import Latency
from asapc.version import __version__
from asapc.writing.environment import cpu_name, environment
from asapc.writing.folder import list_artifacts, output_folder, write_json, write_manifest, write_operators
from asapc.writing.report import (
    CompileReport,
    activations_note,
    early_stop_data,
    early_stop_note,
    plan_note,
    report_data,
)
from asapc.writing.rewrite import export_rivals, rewrite, write_onnx


def compile_model(
    path: str | Path, config: CompileConfig | None = None, on_event: OnEvent = lambda event: None
) -> CompileReport:
    """Compile a checkpoint: find its Sinkhorn attention, replace it, export, build, verify and measure.

    Args:
        path: the checkpoint.
        config: options; None for the defaults.
        on_event: called with progress, see `asapc.events`.

    Returns:
        The report; the artefacts lie in `report.folder`.

    Raises:
        AsapcError: the input is at fault or the fidelity budget is missed. Nothing is written then.
    """
    path, config = Path(path), config or CompileConfig()
    out = Path(config.out or f"{path.stem}.asap")
    with torch_threads(config.threads) as threads, output_folder(out, config.force) as folder:
        with stage("load", on_event) as step:
            loaded = load_model(path, config)
            calibration, held_out = gather_samples(loaded, config)
            counts = f"{loaded.parameters:,} parameters, {len(calibration)} + {len(held_out)} samples"
            step.summary = "; ".join((counts, *loaded.notes))

        with stage("capture", on_event) as step:
            graph = capture(loaded, calibration, config.early_stop)
            check_labels(EagerRunner(graph.program.module()), calibration, held_out)
            axes = parse_axes(config.dynamic, calibration)
            if isinstance(graph, OnnxGraph):
                config = for_onnx_file(config)
            note = early_stop_note(early_stop_data(graph.early_stops))
            step.summary = f"{len(graph.program.graph.nodes)} nodes{note and ', ' + note}"

        with stage("find", on_event) as step:
            graph = build_plans(graph, calibration)
            findings = find(graph, calibration)
            step.summary = f"{len(findings.sites)} Sinkhorn sites"
            require_sites(findings, path)
            opened, sites = graph, list(findings.sites)
            if opens(axes):
                opened, sites = reopen(loaded, calibration, axes, graph, findings.sites, config.early_stop)

        with stage("plan", on_event) as step:
            longest = [at_longest(site, axes, calibration) for site in findings.sites]
            chosen = plan(graph, longest, calibration, held_out, config, step.advance)
            step.summary = plan_note(chosen)

        with stage("rewrite", on_event) as step:
            replaced = operators(findings.sites, chosen)
            amortised = RewriteSinkhorn(findings.sites, replaced)(graph.program.module()).program
            activations = fit_activations(amortised, calibration, config.relu_activations)
            stand_ins = {found.name: found.module for found in activations}
            compiled = rewrite(opened, sites, replaced, activations=stand_ins)
            step.summary = f"{len(compiled.program.graph.nodes)} nodes{activations_note(activations)}"

        with stage("export", on_event) as step:
            metadata = {"asapc.version": __version__, "asapc.source_sha256": loaded.sha256}
            onnx = write_onnx(graph, compiled, findings.sites, replaced, folder / "model.onnx", metadata)
            write_operators(folder / "operator.safetensors", findings.sites, chosen)
            step.summary = f"model.onnx, opset {onnx.opset}"
            deployed, lowered = onnx, compiled
            if config.precision != "float32":
                lowered = rewrite(opened, sites, replaced, getattr(torch, config.precision), stand_ins)
                deployed = export_onnx(lowered, folder / f"model.{config.precision}.onnx", metadata, standard=True)
                step.summary += f"; {deployed.path.name}"

        with stage("engine", on_event) as step:
            engine = build_engine(deployed, folder / "model.engine", max(config.batches), opened.axes)
            step.summary = f"{engine.builder} for {', '.join(engine.targets)}"

        with stage("verify", on_event) as step:
            others = rivals(findings.sites, chosen, max(config.batches), config.wanted_lowering)
            runners = export_rivals(graph, findings.sites, others, threads, step.advance)
            runners["compiled"] = OnnxRuntimeRunner(onnx.path, threads, "compiled")
            step.advance(f"{len(held_out)} held-out samples")
            hops: dict[str, Runner] = {
                "teacher": OnnxRuntimeRunner(path) if isinstance(graph, OnnxGraph) else EagerRunner(loaded.module),
                "capture": EagerRunner(graph.program.module()),
                "amortisation": EagerRunner(amortised),
                **({"activations": EagerRunner(compiled.program.module())} if activations else {}),
                "export": runners["compiled"],
            }
            if config.precision == "float16":
                hops["precision"] = OnnxRuntimeRunner(deployed.path)
            elif config.precision == "bfloat16":  # of which ONNX Runtime has no products on the CPU
                hops["precision"] = EagerRunner(lowered.program.module())
            of_sites = site_fidelity(graph, findings.sites, replaced, held_out)
            fidelity = verify(hops, runners, of_sites, held_out)
            step.summary = f"logits differ by {fidelity.logits_rel:.2%}"
            check_budget(fidelity, config.bounds(), share_of_exact(chosen))

        with stage("measure", on_event) as step:
            runs = []
            for batch in config.batches:
                step.advance(f"batch {batch}")
                runs += measure(runners, held_out, batch, config.seconds, config.seed)
            latency = Latency(cpu_name(), threads, tuple(runs))
            step.summary = f"{len(runners)} variants at batch {', '.join(map(str, config.batches))}"

        artifacts = list_artifacts(folder, [onnx, deployed], engine)
        data = report_data(
            loaded,
            findings,
            chosen,
            activations,
            fidelity,
            config.bounds(),
            latency,
            artifacts,
            environment(config.seed),
        )
        write_json(folder / "report.json", data)
        write_manifest(folder, loaded.sha256, __version__)
    return CompileReport(out, data)


@contextmanager
def torch_threads(wanted: int) -> Iterator[int]:
    """Give torch so many threads, 0 for what it has, and say how many these are."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield wanted or before
    finally:
        torch.set_num_threads(before)


def for_onnx_file(config: CompileConfig) -> CompileConfig:
    """Options for a model that is an ONNX file: its operators keep to standard ONNX, as the file does.

    Raises:
        OptionError: anything else of the file is to be changed than its loops.
    """
    if config.precision != "float32" or config.dynamic or config.relu_activations:
        raise OptionError(
            "an ONNX file keeps its own precision, axes and activations",
            "compile the checkpoint that it was exported from, or leave --precision, --dynamic and "
            "--relu-activations away",
        )
    return replace(config, lowering="materialised")
