"""The report of a compilation: a public interface, described by docs/report.schema.json."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from asapc.types.artifacts import EngineResult, OnnxArtifact
from asapc.types.budget import Verdict
from asapc.types.choices import Alternatives, AmortisedParams, Candidate, Cheaper, Choice, Selection, Tradeoff
from asapc.types.costs import CostModel
from asapc.types.engine import EngineLayer
from asapc.types.graph import EarlyStops
from asapc.types.results import CostCheck, Fidelity, FittedActivation, GpuLatency
from asapc.types.site import Miss, Site
from asapc.types.teacher import Teacher
from asapc.types.timing import BatchLatency, Conditions, Latency, ratio_data

SCHEMA = "asapc.report/3"
WORTHWHILE = 1.05  # times as fast as the exact form: what the planner asks of an approximation too


@dataclass(frozen=True)
class CompileReport:
    """The report of a compilation: what it did, what it costs and what it gains.

    Attributes:
        folder: where the artefacts are.
        data: the content of report.json, which docs/report.schema.json describes.
    """

    folder: Path
    data: Mapping[str, Any]


def report_data(
    run: Mapping[str, Any],
    teacher: Teacher,
    selection: Selection,
    activations: Sequence[FittedActivation],
    fidelity: Fidelity,
    verdict: Verdict,
    latency: Latency,
    costs: CostCheck,
    engine: EngineResult,
    deployed: OnnxArtifact,
    artifacts: list[dict[str, Any]],
    environment: dict[str, object],
) -> dict[str, Any]:
    """Assemble the content of report.json, of plain types only.

    Args:
        run: what was asked for, and what the files say of themselves.
        teacher: the model; what follows is what the stages made of it.
        selection: its operators.
        activations: what replaces smooth activations.
        fidelity: how close it comes.
        verdict: the budget that was in force, judged.
        latency: how fast it is.
        costs: how far the planner's estimates were off.
        engine: what came of it.
        deployed: the ONNX file that the engine was built from.
        artifacts: the files, see `writing.folder.list_artifacts`.
        environment: see `writing.environment`.
    """
    findings = teacher.findings
    as_written = all(choice.candidate.operator == "keep" for choice in selection.choices.values())
    return {
        "schema": SCHEMA,
        **run,
        "sites": [
            {
                **site_data(site),
                "choice": choice_data(selection.choices[site.name]),
                "calibration_range": list(selection.ranges[site.name]),
                "wide": site.name in selection.wide,
                "fidelity": asdict(fidelity.sites[site.name]) if site.name in fidelity.sites else None,
            }
            for site in findings.sites
        ],
        "cheaper": cheaper_data(selection.cheaper),
        "misses": [miss_data(miss) for miss in findings.misses],
        "early_stops": early_stop_data(findings.early_stops),
        "activations": [activation_data(activation) for activation in activations],
        "fidelity": fidelity_data(fidelity),
        "budget": [str(term.bound) for term in verdict.terms],
        "verdict": verdict_data(verdict, latency, as_written),
        "latency": latency_data(latency),
        "costs": costs_data(costs),
        "engine": {
            "status": engine.status,
            "reason": engine.reason,
            "hint": engine.hint,
            "node": engine.node,
            "not_run": engine.not_run,
            "layers": [layer_data(layer, deployed) for layer in engine.artifact.layers] if engine.artifact else [],
        },
        "artifacts": artifacts,
        "environment": environment,
    }


def site_data(site: Site) -> dict[str, Any]:
    """Return a site as `asapc inspect --json` and the report show it."""
    epsilon = [] if site.epsilon is None else [round(e, 9) for e in site.epsilon]
    same = bool(epsilon) and max(epsilon) - min(epsilon) <= 1e-6 * abs(max(epsilon))
    return {
        "name": site.name,
        "source": shorten(site.source),
        "half_steps": site.loop.half_steps,
        "last": site.loop.last,
        "epsilon": epsilon[0] if same else epsilon or None,
        "heads": site.loop.heads,
        "queries": site.loop.queries,
        "keys": site.loop.keys,
        "head_dim": site.head_dim,
        "masked": site.loop.masked,
        "guarded": site.loop.guard is not None,
        "reach": site.loop.reach if isfinite(site.loop.reach) else None,
        "ends_in": "attention" if site.wiring.applied else "plan",
        "share": round(site.share, 4),
    }


def shorten(source: str | None) -> str | None:
    """Make "file:line" relative to the working directory where the file lies below it."""
    if source is None:
        return None
    path = Path(source)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source


def miss_data(miss: Miss) -> dict[str, Any]:
    """Return a miss as `asapc inspect --json` and the report show it."""
    return {"node": miss.node, "source": shorten(miss.source), "reason": miss.reason, "hint": miss.hint}


def activation_data(activation: FittedActivation) -> dict[str, Any]:
    """Return a ReLU network that replaces an activation, as the report shows it."""
    return {name: value for name, value in vars(activation).items() if name != "module"}


def activations_note(activations: Sequence[FittedActivation]) -> str:
    """Return a note on what replaces smooth activations; empty where nothing does."""
    return "".join(f"; {a.nodes} {a.name} in {a.units} ReLU units" for a in activations)


def early_stop_data(early_stops: EarlyStops | None) -> dict[str, Any] | None:
    """Return early stops as `asapc inspect --json` and the report show them; None where the model has none."""
    if early_stops is None:
        return None
    return {
        "stops": [{"source": shorten(source), "question": line} for source, line in early_stops.questions.items()],
        "difference": early_stops.difference,
        "taken": early_stops.taken,
    }


def early_stop_note(data: Mapping[str, Any] | None) -> str:
    """Return in one line what `early_stop_data` holds; empty where the model has no early stops."""
    if data is None:
        return ""
    lines = ", ".join(str(stop["source"]) for stop in data["stops"])
    change = f"the outputs by {data['difference']:.1e}" if data["taken"] else "nothing"
    return f"without the early stop at {lines}, which changes {change} on the samples given"


def selection_note(selection: Selection) -> str:
    """Return in one line what was selected."""
    counts = Counter(choice.candidate.operator for choice in selection.choices.values())
    note = ", ".join(f"{count} {operator}" for operator, count in counts.items())
    return f"{note}; {selection.repairs} repairs" if selection.repairs else note


def engine_note(engine: EngineResult) -> str:
    """Return in one line what came of the engine."""
    if engine.artifact is None:
        return "none" if engine.reason is None else f"none: {engine.reason}"
    built = f"{engine.artifact.builder} for {', '.join(engine.artifact.targets)}"
    notes = [*engine.artifact.notes, *([] if engine.not_run is None else ["built, not run"])]
    return "; ".join([built, *notes])


def layer_data(layer: EngineLayer, onnx: OnnxArtifact) -> dict[str, Any]:
    """Return a layer of an engine as the report shows it, with the sites to which its nodes belong."""
    own = [onnx.place_of(node) for node in layer.nodes]
    return {
        "name": layer.name,
        "kind": layer.kind,
        "precision": list(layer.precision),
        "nodes": list(layer.nodes),
        "modules": list(dict.fromkeys(place.module for place in own if place.module)),
        "sites": list(dict.fromkeys(place.site for place in own if place.site)),
        "attention": layer.attention,
    }


def choice_data(choice: Choice) -> dict[str, Any]:
    """Return a choice as the report shows it, with the other candidates on its front."""
    return {
        **candidate_data(choice.candidate),
        "reason": choice.reason,
        "front": [candidate_data(candidate) for candidate in choice.front],
    }


def candidate_data(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as the report shows it; what it does not have is 0 or none."""
    params, fidelity = candidate.params, candidate.fidelity
    dual = None if isinstance(params, AmortisedParams) else params
    return {
        "operator": candidate.operator,
        "half_steps": candidate.half_steps,
        "lowering": candidate.lowering,
        "slices": 0 if dual is None else dual.slices,
        "features": [] if dual is None else dual.features,
        "side": None if dual is None else dual.side,
        "width": len(params.biases[0]) if isinstance(params, AmortisedParams) else None,
        "doubling": dual.doubling[-1] if dual is not None and dual.doubling else None,
        "estimated_ms": candidate.cost if isfinite(candidate.cost) else None,
        "calibration_relc": fidelity.relc if fidelity is not None and isfinite(fidelity.relc) else None,
    }


def cheaper_data(cheaper: Cheaper | None) -> dict[str, Any] | None:
    """Return the next cheaper selection as the report shows it; None where there is none."""
    if cheaper is None:
        return None
    return {
        "sites": {name: candidate_data(candidate) for name, candidate in cheaper.candidates.items()},
        "estimated_ms": cheaper.cost if isfinite(cheaper.cost) else None,
        "samples": "held-out" if cheaper.held_out else "calibration",
        "margin": cheaper.margin,
        "missed": [
            {"term": str(term.bound), "reached": term.reached if isfinite(term.reached) else None}
            for term in cheaper.missed
        ],
    }


def tradeoffs_data(
    teacher: Teacher,
    alternatives: Alternatives,
    rows: Sequence[Tradeoff],
    softmax: float,
    batch: int,
    model: CostModel,
) -> dict[str, Any]:
    """Return the front of a model as `asapc tradeoffs --json` shows it.

    Args:
        teacher: the model.
        alternatives: what was chosen among.
        rows: selections, cheapest first.
        softmax: estimated milliseconds of softmax at all sites.
        batch: samples a call, which the estimates are for.
        model: the costs that they follow from.
    """
    exact = sum(candidates[0].cost for candidates in alternatives.candidates.values())
    return {
        "schema": "asapc.tradeoffs/1",
        "model": {"path": str(teacher.loaded.path), "sha256": teacher.loaded.sha256},
        "costs": {"model": model.name, "device": model.device},
        "batch": batch,
        "samples": len(teacher.held_out),
        "softmax_ms": softmax,
        "exact_ms": exact,
        "rows": [tradeoff_data(row, softmax, exact) for row in rows],
    }


def tradeoff_data(row: Tradeoff, softmax: float, exact: float) -> dict[str, Any]:
    """Return one row of that front; times are null where a loop is kept."""
    known = isfinite(row.cost)
    candidates = {name: choice.candidate for name, choice in row.selection.choices.items()}
    relc = max((c.fidelity.relc for c in candidates.values() if c.fidelity is not None), default=0.0)
    reached = {name: value if value is None or isfinite(value) else None for name, value in row.reached.items()}
    return {
        "estimated_ms": row.cost if known else None,
        "times_softmax": row.cost / softmax if known else None,
        "times_exact": row.cost / exact if known else None,
        "reached": {name: reached[name] for name in ("agreement", "output-error", "metric-drop")},
        "calibration_relc": relc if isfinite(relc) else None,
        "fidelity": row.term,
        "chosen": row.chosen,
        "sites": {name: candidate_data(candidate) for name, candidate in candidates.items()},
    }


def fidelity_data(fidelity: Fidelity) -> dict[str, Any]:
    """Return end-to-end fidelity for the report, with hops and variants; that of each site stands with the site."""
    data = asdict(fidelity)
    del data["sites"]
    data["hops"] = list(data["hops"])
    return data


def verdict_data(verdict: Verdict, latency: Latency | None = None, as_written: bool = False) -> dict[str, Any]:
    """Return a verdict for the report: whether the budget is kept, what was reached of each term, and the speedup."""
    terms = [
        {
            "term": str(term.bound),
            "reached": term.reached if isfinite(term.reached) else None,
            "met": term.met,
            "closest": str(term.tightest) if isfinite(term.reached) else None,
        }
        for term in verdict.terms
    ]
    speed = "" if latency is None else f"; {speed_note(latency, as_written)}"
    return {"passed": verdict.passed, "headline": verdict.headline + speed, "terms": terms}


def speed_note(latency: Latency, as_written: bool = False) -> str:
    """Return what is gained over the exact form at the largest batch, and what to do where that is nothing."""
    largest = max(latency.batches, key=lambda of_batch: of_batch.batch)
    exact = largest.ratios["exact"]
    times = f"{exact.value:.2f}x as fast as exact Sinkhorn ({exact.low:.2f} to {exact.high:.2f})"
    seen, finding = f"{times} at batch {largest.batch}", exact.finding
    if finding == "identical":
        return "this is exact Sinkhorn"
    if finding == "faster" or exact.high < WORTHWHILE:
        return f"{seen}: {'-O1 writes that form' if as_written else 'the approximation does not pay, use -O1 here'}"
    noise = f", which this run cannot tell from 1: the same file opened twice may differ by {largest.floor:.0%}"
    return seen if finding == "slower" else seen + noise


def latency_data(latency: Latency) -> dict[str, Any]:
    """Return runs and ratios, and at the largest batch speedups: above 1 says that the compiled model is faster."""
    largest = max(latency.batches, key=lambda of_batch: of_batch.batch)
    value = {name: ratio.value for name, ratio in largest.ratios.items()}
    return {
        "device": latency.device,
        "threads": latency.threads,
        "batch": largest.batch,
        "runs": [asdict(run) | {"device": latency.device} for of_batch in latency.batches for run in of_batch.runs],
        "ratios": [
            {"batch": of_batch.batch, "name": name, **ratio_data(ratio)}
            for of_batch in latency.batches
            for name, ratio in of_batch.ratios.items()
        ],
        "measurements": [measurement_data(of_batch) for of_batch in latency.batches],
        "conditions": conditions_data(latency.conditions),
        "warnings": [
            *latency.warnings,
            *(f"batch {of_batch.batch}: {line}" for of_batch in latency.batches for line in of_batch.warnings),
        ],
        "speedup_vs_teacher": value["teacher"],
        "speedup_vs_exact": value["exact"],
        "speedup_vs_truncated": value["truncated"],
        "ratio_to_softmax": 1 / value["softmax"],
        "gpu": None if latency.gpu is None else gpu_data(latency.gpu),
    }


def gpu_data(gpu: GpuLatency) -> dict[str, Any]:
    """Return the runs on a GPU, with its clocks before and after."""
    return {
        "device": gpu.device,
        "settled": gpu.settled,
        "clocks": [asdict(clocks) for clocks in gpu.clocks],
        "notes": list(gpu.notes),
        "runs": [asdict(run) for run in gpu.runs],
    }


def measurement_data(of_batch: BatchLatency) -> dict[str, Any]:
    """Return how well one batch size was measured."""
    return {
        "batch": of_batch.batch,
        "blocks": of_batch.blocks,
        "noise_floor": of_batch.floor,
        "stable": of_batch.stable,
    }


def conditions_data(conditions: Conditions) -> dict[str, Any]:
    """Return what the machine did meanwhile."""
    return {
        "cores": list(conditions.cores),
        "load": conditions.load,
        "busy_cores_of_others": conditions.others,
        "megahertz": list(conditions.megahertz),
    }


def costs_data(check: CostCheck) -> dict[str, Any]:
    """Return the costs that the planner read, and how far they were from what was measured."""
    model = check.model
    return {
        "model": model.name,
        "device": model.device,
        "file": None if model.file is None else str(model.file),
        "median_error": model.median_error,
        "batch": check.batch,
        "estimated_ms": check.estimated_ms,
        "measured_ms": check.measured_ms,
        "reason": check.reason,
    }
