"""`asapc compile`: from a file to its compiled form, one stage after the other."""

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

from asapc.backends.base import RememberingRunner, Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.backends.tensorrt.builder import WITHOUT, check_options, try_engine
from asapc.backends.tensorrt.durations import keep_duration, last_duration
from asapc.backends.tensorrt.profiles import narrowed
from asapc.backends.tensorrt.runner import EngineRunner
from asapc.commands.figures import gather_figures
from asapc.commands.gpu import measure_gpu, open_built
from asapc.commands.inspect import require_sites
from asapc.commands.study import Gather, study, torch_threads
from asapc.commands.target import cost_model
from asapc.config import CompileConfig
from asapc.events import OnEvent, Stage, Timed, stage
from asapc.fidelity.budget import check_budget
from asapc.fidelity.outputs import BATCH, verify
from asapc.fidelity.sites import site_fidelity
from asapc.loading.split import gather_samples
from asapc.loading.teacher import model_data
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.cache import cache_note, cache_of
from asapc.planning.choose import choose
from asapc.planning.costs import estimate_all, share_of_exact
from asapc.planning.operators import alike, operators, rivals, softmax_cost
from asapc.relu.stand_ins import fit_activations
from asapc.timing.blocks import Effort, save_times
from asapc.timing.compare import compare as compare_times
from asapc.timing.machine import Watch, warn_of_load
from asapc.types.artifacts import EngineResult, OnnxArtifact
from asapc.types.choices import Selection
from asapc.types.costs import CostModel
from asapc.types.graph import BATCH_AXIS, Axes, CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.results import CostCheck, Fidelity, FittedActivation, SiteFidelity
from asapc.types.teacher import Teacher
from asapc.types.timing import Latency
from asapc.version import __version__
from asapc.writing.dump import Dump
from asapc.writing.environment import cpu_name, environment
from asapc.writing.folder import list_artifacts, output_folder, write_json, write_manifest
from asapc.writing.held_out import write_held_out
from asapc.writing.html import FIGURES, PAGE, render, write_figures
from asapc.writing.operators import write_operators
from asapc.writing.origins import origin_of
from asapc.writing.recipe import command_line, options_data
from asapc.writing.report import CompileReport, activations_note, engine_note, report_data, selection_note
from asapc.writing.rewrite import export_rivals, rewrite
from asapc.writing.usage import interface_of, write_readme, write_samples


@dataclass(frozen=True, eq=False)
class Compiled:
    """A teacher with operators in it.

    Attributes:
        operators: by the site's name.
        amortised: the teacher's graph with them, as a module.
        activations: what replaces smooth activations; empty where they are kept.
        program: the open graph with operators and activations, as it is exported.
        lowered: the same in the engine's precision; `program` where that is float32.
    """

    operators: Mapping[str, nn.Module]
    amortised: GraphModule
    activations: Sequence[FittedActivation]
    program: CapturedGraph
    lowered: CapturedGraph


@dataclass(frozen=True, eq=False)
class Files:
    """The ONNX files of a compiled model: for ONNX Runtime, and for the engine; often the same."""

    onnx: OnnxArtifact
    deployed: OnnxArtifact

    @property
    def by_path(self) -> dict[Path, OnnxArtifact]:
        """Each file once."""
        return {file.path: file for file in (self.onnx, self.deployed)}


def compile_model(
    model: str | Path | LoadedModel,
    config: CompileConfig | None = None,
    on_event: OnEvent = lambda event: None,
    gather: Gather = gather_samples,
) -> CompileReport:
    """Compile a model: find its Sinkhorn attention, replace it, export, build, verify and measure.

    Args:
        model: its file, or the model where it is loaded.
        config: options; None for the defaults.
        on_event: called with progress, see `asapc.events`.
        gather: gives calibration and held-out samples.

    Returns:
        The report; the artefacts lie in `report.folder`.

    Raises:
        AsapcError: the input is at fault or the fidelity budget is missed. Nothing is written then.
    """
    path, config = model.path if isinstance(model, LoadedModel) else Path(model), config or CompileConfig()
    command, began, on_event = command_line(path, config), datetime.now(UTC), Timed(on_event)
    out = Path(config.out or f"{Path(os.path.abspath(path)).stem.strip('<>')}.asap")  # a folder may be named by dots
    dump, costs = Dump(None if config.dump is None else Path(config.dump)), cost_model(config)
    # The folder is opened first: whoever cannot write it should not learn so after minutes of work.
    with (
        torch_threads(config.threads) as threads,
        output_folder(out, config.force) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        check_options(config.target, config.engine_options())  # known before minutes of work
        teacher = study(model, config, gather, on_event, dump)
        open_axes(teacher, config)
        require_sites(teacher.findings, path, shows_misses=isinstance(model, LoadedModel))
        config = origin_of(teacher.loaded).adapt(config)

        with stage("select", on_event) as step:
            cache = cache_of(config)
            selection = choose(teacher, config, costs, step.advance, cache)
            dump.selection("select", selection)
            step.summary = selection_note(selection) + cache_note(cache)

        with stage("rewrite", on_event) as step:
            compiled = replace_sites(teacher, selection, config)
            dump.graph("rewrite", compiled.program)
            if compiled.lowered is not compiled.program:
                dump.graph(f"rewrite-{config.precision}", compiled.lowered)
            step.summary = f"{len(compiled.program.program.graph.nodes)} nodes{activations_note(compiled.activations)}"

        # Before anything is exported or built, which takes long: in torch, a miss shows already.
        with stage("check", on_event) as step:
            hops = hops_in_torch(teacher, compiled)
            checked = compare_in_torch(teacher, compiled, hops)
            check_budget(checked, config.bounds(), share_of_exact(selection))
            step.summary = f"{len(teacher.held_out)} held-out samples in PyTorch"

        with stage("export", on_event) as step:
            files = write(teacher, selection, compiled, folder, config)
            for file in files.by_path.values():
                dump.onnx(file.path.stem, file)
            step.summary = f"{', '.join(path.name for path in files.by_path)}, opset {files.onnx.opset}"

        # Before the rivals are exported, which takes long: a model without an engine fails early.
        with stage("engine", on_event) as step:
            engine = build(teacher, files.deployed, folder / "model.engine", config, step)
            engine, on_gpu = open_built(engine)
            step.summary = engine_note(engine)

        with stage("verify", on_event) as step:
            runners = variants(teacher, selection, compiled, files, config, costs, threads, Path(scratch), step)
            step.advance(f"{len(teacher.held_out)} held-out samples")
            fidelity = compare(teacher, compiled, checked.sites, files, runners, hops, config, on_gpu)
            verdict = check_budget(fidelity, config.bounds(), share_of_exact(selection))
            step.summary = verdict.headline
            if config.samples_in_folder:
                size = teacher.graph.samples_at_once(BATCH)  # of the batches in which the outputs are remembered
                outputs = [hops["teacher"](some) for some in teacher.held_out.batches(size)]
                write_held_out(folder / "held_out.npz", teacher.held_out, outputs)

        # After the budget: a model that misses it is not worth measuring.
        with stage("measure", on_event) as step:
            latency = measure_all(teacher, runners, files.deployed, on_gpu, config, threads, folder, step)
            step.summary = f"{len(runners)} variants at batch {', '.join(map(str, config.batches))}"

        with stage("figures", on_event) as step:
            figures = gather_figures(teacher, selection, compiled.operators)
            write_figures(folder / FIGURES, figures)
            step.summary = "attention of held-out samples"

        own = runners["compiled"]
        interface = interface_of(own, teacher.open_graph)
        run = {
            "date": began.isoformat(timespec="seconds"),
            "command": command,
            "model": model_data(teacher.loaded, config),
            **{side: infos for side, infos in interface.data().items() if side != "axes"},
            "options": options_data(config, out, threads),
            "stages": [{"stage": name, "seconds": round(seconds, 3)} for name, seconds in on_event.seconds.items()],
        }
        data = report_data(
            run,
            teacher,
            selection,
            compiled.activations,
            fidelity,
            verdict,
            latency,
            check_costs(teacher, compiled, latency, config, costs),
            engine,
            files.deployed,
            list_artifacts(folder, [files.onnx, files.deployed], engine.artifact),
            environment(config.seed),
        )
        write_json(folder / "report.json", data)
        (folder / PAGE).write_text(render(data, figures), encoding="utf-8")
        samples = teacher.held_out[: config.samples_in_folder]
        write_samples(folder, samples, own)
        write_readme(folder, out.stem, interface, engine, len(samples))
        write_manifest(folder, teacher.loaded.sha256, __version__, interface)  # last, since it lists all files
    return CompileReport(out, data)


def replace_sites(teacher: Teacher, selection: Selection, config: CompileConfig) -> Compiled:
    """Put the selected operators, and networks for activations where asked for, into the teacher's graphs."""
    modules = operators(teacher.sites, selection)
    amortised = RewriteSinkhorn(teacher.sites, modules)(teacher.graph.program.module()).program
    activations = fit_activations(amortised, teacher.calibration, config.relu_activations)
    stand_ins = {activation.name: activation.module for activation in activations}
    program = rewrite(teacher.open_graph, teacher.open_sites, modules, activations=stand_ins)
    lowered = program
    if config.precision != "float32":
        precision = getattr(torch, config.precision)
        lowered = rewrite(teacher.open_graph, teacher.open_sites, modules, precision, stand_ins)
    return Compiled(modules, amortised, activations, program, lowered)


def write(teacher: Teacher, selection: Selection, compiled: Compiled, folder: Path, config: CompileConfig) -> Files:
    """Write the compiled model and its parameters into the output folder."""
    metadata = {"asapc.version": __version__, "asapc.source_sha256": teacher.loaded.sha256}
    origin, sites = origin_of(teacher.loaded), teacher.sites
    onnx = origin.write(teacher.graph, compiled.program, sites, compiled.operators, folder / "model.onnx", metadata)
    write_operators(folder / "operator.safetensors", sites, selection)
    if config.precision == "float32":
        return Files(onnx, onnx)
    path = folder / f"model.{config.precision}.onnx"
    names = compiled.program.output_names  # casts end this graph, and would name its outputs
    return Files(onnx, export_onnx(compiled.lowered, path, metadata, standard=True, names=names))


def open_axes(teacher: Teacher, config: CompileConfig) -> Axes:
    """Return the open axes of all inputs.

    Raises:
        OptionError: --profile does not fit them.
    """
    shapes = {name: tuple(value.shape) for name, value in teacher.open_graph.example.inputs.items()}
    axes = teacher.open_graph.axes or {name: {0: BATCH_AXIS} for name in shapes}
    narrowed(config.engine_options().profiles, shapes, axes, max(config.batches))
    return axes


def build(teacher: Teacher, onnx: OnnxArtifact, path: Path, config: CompileConfig, step: Stage) -> EngineResult:
    """Build the engine that the options ask for, and say how long that took the last time."""
    options, batch = config.engine_options(), max(config.batches)
    asked = (teacher.loaded.sha256, config.target, config.precision, config.dynamic, config.level, batch, options)
    key = hashlib.sha256(repr(asked).encode()).hexdigest()
    last = None if config.no_cache else last_duration(key)
    if config.target not in WITHOUT:
        step.wait("NVIDIA's compiler" + ("" if last is None else f", which took {last:.0f} s the last time"))
    start = time.perf_counter()
    engine = try_engine(config.target, onnx, path, batch, open_axes(teacher, config), options)
    if engine.artifact is not None and not config.no_cache:
        keep_duration(key, time.perf_counter() - start)
    return engine


def variants(
    teacher: Teacher,
    selection: Selection,
    compiled: Compiled,
    files: Files,
    config: CompileConfig,
    model: CostModel,
    threads: int,
    scratch: Path,
    step: Stage,
) -> dict[str, OnnxRuntimeRunner]:
    """Open what is compared and timed in ONNX Runtime: the rivals by name, and the compiled model last."""
    modules = rivals(teacher.sites, selection, max(config.batches), model, config.wanted_lowering)
    own = OnnxRuntimeRunner(files.onnx.path, threads, "compiled")
    # Of two that are the same, one is exported.
    same = {name for name in modules if not compiled.activations and alike(modules[name], compiled.operators)}
    others = {name: of_sites for name, of_sites in modules.items() if name not in same}
    runners = export_rivals(teacher, others, threads, scratch, step.advance)
    return {**{name: own if name in same else runners[name] for name in modules}, "compiled": own}


def compare_in_torch(teacher: Teacher, compiled: Compiled, hops: Mapping[str, RememberingRunner]) -> Fidelity:
    """Measure fidelity on held-out samples, hop by hop as far as no file is needed, and site by site."""
    of_sites = site_fidelity(teacher.graph, teacher.sites, compiled.operators, teacher.held_out, hops["capture"])
    return verify(hops, {}, of_sites, teacher.held_out, teacher.graph.samples_at_once(BATCH))


def compare(
    teacher: Teacher,
    compiled: Compiled,
    of_sites: Mapping[str, SiteFidelity],
    files: Files,
    runners: Mapping[str, Runner],
    in_torch: Mapping[str, Runner],
    config: CompileConfig,
    on_gpu: Runner | None,
) -> Fidelity:
    """Measure fidelity on held-out samples, hop by hop to the files; that of sites, which need none, is known.

    Hops give a name to the step that costs most.
    """
    hops = {**in_torch, "export": runners["compiled"]}
    if config.precision == "float16":
        hops["precision"] = OnnxRuntimeRunner(files.deployed.path)
    elif config.precision == "bfloat16":  # ONNX Runtime cannot multiply it on the CPU
        hops["precision"] = EagerRunner(compiled.lowered.program.module())
    if on_gpu is not None:
        hops["engine"] = on_gpu
    return verify(hops, runners, of_sites, teacher.held_out, teacher.graph.samples_at_once(BATCH))


def hops_in_torch(teacher: Teacher, compiled: Compiled) -> dict[str, RememberingRunner]:
    """Open the model as loaded, and after each step of the compilation that leaves it in torch."""
    hops: dict[str, Runner] = {
        "teacher": origin_of(teacher.loaded).reference(),
        "capture": EagerRunner(teacher.graph.program.module()),
        "amortisation": EagerRunner(compiled.amortised),
    }
    if compiled.activations:
        hops["activations"] = EagerRunner(compiled.program.program.module())
    # Fidelity is measured before the export and after it.
    return {name: RememberingRunner(runner) for name, runner in hops.items()}


def measure_all(
    teacher: Teacher,
    runners: Mapping[str, OnnxRuntimeRunner],
    deployed: OnnxArtifact,
    on_gpu: EngineRunner | None,
    config: CompileConfig,
    threads: int,
    folder: Path,
    step: Stage,
) -> Latency:
    """Measure the latency of all variants on the CPU, and of the compiled model on a GPU, at every batch size.

    The raw times of the CPU go into the folder.
    """
    own, watch = runners["compiled"], Watch()
    same = {name: "compiled" for name, runner in runners.items() if runner is own and name != "compiled"}
    models = {"compiled": own.reopen, **{name: runners[name].reopen for name in runners if name not in same}}
    effort = Effort(config.seconds, seed=config.seed)
    results = {
        batch: compare_times(models, same, teacher.held_out, batch, effort, step.advance) for batch in config.batches
    }
    save_times(folder / "latency.npz", {batch: times for batch, (_, times) in results.items()})
    batches = tuple(of_batch for of_batch, _ in results.values())
    conditions = watch.conditions
    step.advance("GPU")
    gpu = measure_gpu(deployed, on_gpu, teacher.held_out, config.batches, config.seconds, config.seed)
    return Latency(cpu_name(), threads, batches, conditions, tuple(warn_of_load(conditions)), gpu)


def check_costs(
    teacher: Teacher, compiled: Compiled, latency: Latency, config: CompileConfig, model: CostModel
) -> CostCheck:
    """Compare what the operators were estimated to add to softmax attention with what they add, at the largest batch.

    All else in the model takes the same time with both, and goes out of the difference.
    """
    batch = max(config.batches)
    if model.provider != "cpu":
        return CostCheck(model, batch, reason="these are the costs of a GPU, and latency was measured on the CPU")
    if len(compiled.operators) < len(teacher.sites):
        return CostCheck(model, batch, reason="a loop that is kept as written has no estimate")
    if compiled.activations:
        return CostCheck(model, batch, reason="activations were replaced beside the operators")
    own = estimate_all(teacher.sites, compiled.operators, batch, model)
    floor = softmax_cost(teacher.sites, batch, model, config.wanted_lowering)
    [largest] = (of_batch for of_batch in latency.batches if of_batch.batch == batch)
    p50 = {run.name: run.p50_ms for run in largest.runs}
    return CostCheck(model, batch, own - floor, p50["compiled"] - p50["softmax"])
