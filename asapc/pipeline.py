"""The line from a checkpoint to its compiled form: each step one stage, in the order in which they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from asapc.activations import fit_activations
from asapc.artifacts import CapturedGraph, Findings, Samples
from asapc.backends.base import Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.backends.tensorrt.builder import build_engine
from asapc.capture import capture
from asapc.config import CompileConfig
from asapc.costs import share_of_exact
from asapc.dynamic import at_longest, opens, parse_axes, reopen
from asapc.environment import cpu_name, environment
from asapc.errors import NoSinkhornError, OptionError
from asapc.events import OnEvent, stage
from asapc.export import export_rivals, rewrite, write_onnx
from asapc.gather import gather_samples, probe_samples
from asapc.loading import load_model
from asapc.measure import measure
from asapc.onnx_graph import OnnxGraph
from asapc.operators import operators, rivals
from asapc.output import list_artifacts, output_folder, write_json, write_manifest, write_operators
from asapc.passes.build_plan import build_plans
from asapc.passes.evidence import find_with_evidence
from asapc.passes.rewrite_sinkhorn import RewriteSinkhorn
from asapc.plan import plan
from asapc.propose import propose
from asapc.report import (
    CompileReport,
    activations_note,
    early_stop_data,
    early_stop_note,
    plan_note,
    report_data,
    shorten,
)
from asapc.results import Latency
from asapc.verify import check_budget, check_labels, site_fidelity, verify
from asapc.version import __version__


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


def share_calibration(path: str | Path, config: CompileConfig) -> None:
    """What all processes but the first do where torchrun started several: see, fit, and leave the rest to the first.

    Raises:
        AsapcError: as of `compile_model`.
    """
    loaded = load_model(path, config)
    calibration, _ = gather_samples(loaded, config)
    graph = build_plans(capture(loaded, calibration, config.early_stop), calibration)
    propose(graph, find(graph, calibration).sites, calibration, config)


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


def find(graph: CapturedGraph, calibration: Samples) -> Findings:
    """What there is to find in a graph, with the early stops that capturing it has left out."""
    return replace(find_with_evidence(graph, calibration), early_stops=graph.early_stops)


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
