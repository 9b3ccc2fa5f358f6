"""`asapc check`: the gate of a compiled model, on fidelity and on latency."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands.folders import Folder
from asapc.commands.gates import CheckOptions, Measurement, baseline_data, compare_fingerprints, fingerprint
from asapc.commands.study import torch_threads
from asapc.commands.verify import StoredOutputs, Verification, check_stored, verify_model
from asapc.config import CompileConfig
from asapc.errors import AsapcError, FidelityError, RegressionError, UnstableError
from asapc.events import OnEvent, stage
from asapc.fidelity.budget import check_budget
from asapc.fidelity.outputs import verify
from asapc.loading.baseline import read_baseline
from asapc.timing.machine import Watch, warn_of_load
from asapc.types.budget import Verdict, parse_bound
from asapc.types.results import Hop, SiteFidelity
from asapc.types.timing import Conditions, Gate
from asapc.writing.folder import output_file, write_json
from asapc.writing.report import conditions_data, verdict_data


@dataclass(frozen=True, eq=False)
class Check:
    """What a gate says of a folder.

    Attributes:
        folder: what was checked.
        against: what its latency was held to, a file or a folder; None where it was held to nothing.
        verdict: on fidelity.
        error: why the budget is missed; None where it is kept.
        gates: on latency, one a batch size.
        conditions: of the machine.
    """

    folder: Path
    against: Path | None
    verdict: Verdict
    error: FidelityError | None
    gates: tuple[Gate, ...]
    conditions: Conditions

    @property
    def failure(self) -> AsapcError | None:
        """The error that the command ends with: fidelity first, then a regression; None where every gate passed."""
        if self.error is not None:
            return self.error
        for outcome, kind, hint in (
            ("regression", RegressionError, "look at what changed, or allow more with --max-slowdown"),
            ("unstable", UnstableError, "measure on a quieter machine, for longer with --seconds, or with --relative"),
        ):
            seen = [f"batch {gate.batch}: {gate.reason}" for gate in self.gates if gate.outcome == outcome]
            if seen:
                word = "slower than" if kind is RegressionError else "latency is not stable enough to compare with"
                return kind(f"{self.folder}: {word} {self.against}: {'; '.join(seen)}", hint)
        return None

    @property
    def outcome(self) -> str:
        """In one word: passed, fidelity, regression or unstable."""
        words = {FidelityError: "fidelity", RegressionError: "regression", UnstableError: "unstable"}
        return "passed" if self.failure is None else words[type(self.failure)]

    def data(self) -> dict[str, Any]:
        """Return what `asapc check --json` prints, see docs/check.schema.json."""
        return {
            "schema": "asapc.check/1",
            "folder": str(self.folder),
            "against": None if self.against is None else str(self.against),
            "outcome": self.outcome,
            "exit_code": 0 if self.failure is None else self.failure.exit_code,
            "verdict": verdict_data(self.verdict),
            "gates": [gate.data() for gate in self.gates],
            "conditions": conditions_data(self.conditions),
            "warnings": warn_of_load(self.conditions) if any(gate.blocks for gate in self.gates) else [],
        }


def check_folder(
    path: Path,
    options: CheckOptions | None = None,
    config: CompileConfig | None = None,
    on_event: OnEvent = lambda event: None,
) -> Check:
    """Hold a compiled folder to its fidelity budget, and its latency to a baseline or to another folder.

    Args:
        path: what `compile_model` wrote.
        options: what to hold it to.
        config: the budget, the threads, the seed, and how to read the teacher.
        on_event: called with progress.

    Returns:
        What was found; `failure` says which gate failed.

    Raises:
        CheckpointError: a folder or the baseline is not whole.
        NotComparableError: the baseline is of another model or machine, or of a newer asapc.
        SamplesError: samples do not fit the model, or none were kept.
    """
    options, config = options or CheckOptions(), config or CompileConfig()
    with torch_threads(config.threads) as threads, ExitStack() as files:
        save = None if options.save is None else files.enter_context(output_file(options.save, force=True))
        folder, baseline = Folder.at(path), None
        other = None if options.relative is None else Folder.at(options.relative)
        samples = folder.samples(options.data)
        if options.baseline is not None:
            baseline = read_baseline(options.baseline)
            compare_fingerprints(options.baseline, baseline, fingerprint(folder, samples, threads, options.runtime))
        if other is not None:
            other.fit(samples)
        with stage("verify", on_event) as step:
            verification, error = hold_fidelity(folder, options, config)
            step.summary = verification.verdict.headline
        watch, gates = Watch(), []
        if options.save is not None or baseline is not None or other is not None:
            with stage("measure", on_event) as step:
                measurement = Measurement(folder, samples, threads, options, config.seed, step)
                gates = measurement.relative(other) if other is not None else measurement.alone(baseline)
                held = "; ".join(f"batch {gate.batch}: {gate.outcome}" for gate in gates)
                step.summary = held or f"batch {', '.join(map(str, measurement.times))}"
            if save is not None:
                write_json(save, baseline_data(measurement, watch.conditions))
    against = options.relative or options.baseline
    return Check(path, against, verification.verdict, error, tuple(gates), watch.conditions)


def hold_fidelity(
    folder: Folder, options: CheckOptions, config: CompileConfig
) -> tuple[Verification, FidelityError | None]:
    """Return the fidelity of a folder, and the error where it misses its budget.

    On samples of its own, outputs are compared with those that the teacher once gave for them, in the runtime of today;
    what the sites' operators give on these samples has not changed since, for neither has.
    """
    shown: list[Verification] = []
    try:
        if options.data is not None:
            return verify_model(folder.path, options.data, options.teacher, config, shown.append), None
        samples, stored = folder.samples(None), folder.held_out[1]
        runner = OnnxRuntimeRunner(folder.model)
        check_stored(folder.path, samples, folder.path, stored, runner)
        report = folder.report
        sites = {s["name"]: SiteFidelity(**s["fidelity"]) for s in report["sites"] if s["fidelity"] is not None}
        fidelity = verify({"teacher": StoredOutputs(stored), "compiled": runner}, {}, sites, samples)
        captures = [Hop(**hop) for hop in report["fidelity"]["hops"] if hop["name"] == "capture"]
        fidelity = replace(fidelity, hops=(*captures, *fidelity.hops))
        budget = config.bounds() or tuple(map(parse_bound, report["budget"]))
        shown.append(Verification(fidelity, budget, {}))
        check_budget(fidelity, budget)
    except FidelityError as error:
        return shown[0], error
    return shown[0], None
