"""`asapc verify`: the fidelity of a compiled model on other samples, against its teacher or its stored outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.errors import CaptureError, CheckpointError, OptionError, SamplesError, one_line
from asapc.fidelity.budget import check_budget, judge, reached
from asapc.fidelity.outputs import BATCH, verify
from asapc.fidelity.sites import site_fidelity
from asapc.loading.choice import read_choice
from asapc.loading.folder import OPERATORS, check_lengths, read_folder
from asapc.loading.inputs import as_exported, compare_types, order_inputs
from asapc.loading.manifest import COMPILE, MODEL
from asapc.loading.samples import load_samples
from asapc.loading.teacher import load_teacher
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_safetensors
from asapc.planning.operators import operators, packs
from asapc.planning.ranges import score_ranges
from asapc.types.budget import DEFAULT_BUDGET, SITE_METRICS, Bound, Verdict, parse_bound
from asapc.types.choices import Choice, Selection
from asapc.types.model import LoadedModel
from asapc.types.results import Fidelity, SiteFidelity
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.writing.origins import origin_of
from asapc.writing.report import fidelity_data, site_data, verdict_data

Show = Callable[["Verification"], None]
# A site has left the range of its calibration where more than this share of the samples lies outside of it, widened
# by so much of its width at either end.
MAX_OUTSIDE, WIDENED = 0.05, 0.1
NAMED = 5  # places of plans outside that are named
# Without a term of its own, the error of outputs may grow to this many times that of the compilation, or to the default
# limit: equal classes alone do not say that outputs are still those of the teacher.
MAX_GROWTH = 4.0


@dataclass(frozen=True)
class Outside:
    """Plans of a site whose scores spread less, or more, than any in calibration.

    Attributes:
        count: how many there are.
        plans: of how many: one a sample, or one a token where each token has a small plan of its own.
        places: the first of them, as numbers of the sample and of the plan within it.
    """

    count: int
    plans: int
    places: tuple[tuple[int, int], ...]

    @property
    def share(self) -> float:
        """The share of plans outside."""
        return self.count / self.plans


@dataclass(frozen=True)
class Verification:
    """How a compiled model compares with its teacher on other samples.

    Attributes:
        fidelity: of the compiled file against the teacher.
        budget: what the model was compiled to keep, as far as it can be judged here; empty for the default.
        outside: by the site's name what lies outside of its calibration, None where the operator is the loop on all
            scores; empty where there are only outputs to compare.
        note: why sites are not rated; empty where they are.
    """

    fidelity: Fidelity
    budget: tuple[Bound, ...]
    outside: Mapping[str, Outside | None]
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """The budget, judged."""
        return judge(self.fidelity, self.budget)

    @property
    def shifted(self) -> list[str]:
        """Sites that have left the range of their calibration."""
        return [name for name, of in self.outside.items() if of is not None and of.share > MAX_OUTSIDE]

    def data(self) -> dict[str, Any]:
        """Return what `asapc verify --json` prints."""
        fidelities = self.fidelity.sites
        sites = [
            {
                "name": name,
                "fidelity": asdict(fidelities[name]) if name in fidelities else None,
                "outside_calibration": None if outside is None else outside.share,
                "outside": None if outside is None else asdict(outside),
                "shifted": name in self.shifted,
            }
            for name, outside in self.outside.items()
        ]
        return {
            "schema": "asapc.verify/1",
            "verdict": verdict_data(self.verdict),
            "fidelity": fidelity_data(self.fidelity),
            "sites": sites,
            "sites_note": self.note,
        }


class StoredOutputs:
    """Outputs that a model gave once, as a runner: asked for the samples in their order, batch by batch.

    Args:
        outputs: arrays in the order in which the model returns them.
    """

    runtime = "stored"

    def __init__(self, outputs: Samples) -> None:
        self.outputs, self.position = outputs, 0

    def __call__(self, samples: Samples) -> list[Tensor]:
        """Return the outputs of the next samples."""
        start, self.position = self.position, self.position + len(samples)
        return list(self.outputs[start : self.position].inputs.values())


def verify_outputs(
    folder: Path, data: Path, outputs: Path, config: CompileConfig | None = None, show: Show = lambda verification: None
) -> Verification:
    """Compare the compiled model in a folder with outputs of its teacher that were stored; see `verify_model`.

    Args:
        folder: what `compile_model` wrote.
        data: samples, named as the model's inputs, with labels where there are any.
        outputs: .npz or .pt file, one array for each output of the teacher in its order, for the same samples.
        config: options; the budget matters here.
        show: called with the result before it is held to the budget.

    Raises:
        CheckpointError: the folder is not whole.
        SamplesError: samples or outputs do not fit the model, or each other.
        OptionError: the budget has a term that outputs alone cannot tell.
        FidelityError: the budget is missed.
    """
    config = config or CompileConfig()
    of_sites = [str(bound) for bound in config.bounds() if bound.metric in SITE_METRICS]
    if of_sites:
        raise OptionError(
            f"stored outputs tell nothing about {', '.join(of_sites)}", "omit --outputs, or the terms about sites"
        )
    report = read_folder(folder)
    runner = OnnxRuntimeRunner(folder / MODEL)
    samples, stored = as_exported(load_samples(data), runner.inputs), load_samples(outputs)
    check_stored(data, samples, outputs, stored, runner)
    check_lengths(folder, samples)
    fidelity = verify({"teacher": StoredOutputs(stored), "compiled": runner}, {}, {}, samples)
    verification = Verification(fidelity, config.bounds() or budget_of(report, fidelity), {})
    return hold(verification, show)


def check_stored(data: Path, samples: Samples, outputs: Path, stored: Samples, runner: OnnxRuntimeRunner) -> None:
    """Raise SamplesError where samples are not of the model's inputs, or stored outputs not of its outputs for them."""
    if runner.inputs.keys() != samples.inputs.keys():
        arrays, names = ", ".join(samples.inputs), ", ".join(runner.inputs)
        raise SamplesError(f"{data} holds {arrays}; the model's inputs are {names}", "name the arrays as the inputs")
    compare_types(Path(runner.name), samples, runner.inputs)
    expected = [tuple(output.shape[1:]) for output in runner(samples[:1])]
    shapes = [tuple(output.shape[1:]) for output in stored.inputs.values()]
    if shapes != expected or len(stored) != len(samples):
        raise SamplesError(
            f"{outputs} holds outputs of {len(stored)} samples and shapes {shapes}; {len(samples)} samples of the "
            f"model give shapes {expected}",
            "store what the teacher returns for the samples of --data, one array for each output, in its order",
        )


def verify_model(
    folder: Path,
    data: Path,
    teacher: Path | None = None,
    config: CompileConfig | None = None,
    show: Show = lambda verification: None,
) -> Verification:
    """Compare the compiled model in a folder with its teacher on the samples of a file.

    Args:
        folder: what `compile_model` wrote.
        data: samples, named as the model's inputs, with labels where there are any.
        teacher: the model that was compiled; None for the path that the report names.
        config: options; the budget matters, and those that say how to read the teacher, where that is not as the
            report says.
        show: called with the result before it is held to the budget.

    Raises:
        CheckpointError: the folder is not whole, was not compiled from this teacher, or comes from elsewhere and names
            code that builds it.
        OptionError: `unsafe_load` without a teacher, or no teacher where that was an object in Python.
        SamplesError: the samples do not fit the model, or do not show what a term of `config` is about.
        FidelityError: the budget is missed: that of `config`, else what the model was compiled to keep.
    """
    config = config or CompileConfig()
    report = read_folder(folder)
    loaded = load_teacher(folder, report, teacher, config)
    samples, compiled = order_inputs(loaded, load_samples(data)), OnnxRuntimeRunner(folder / MODEL)
    compare_types(folder / MODEL, samples, compiled.inputs)
    check_lengths(folder, samples)
    ratings = rate_sites(folder, report, loaded, samples, config)
    if ratings.note and (of_sites := [str(bound) for bound in config.bounds() if bound.metric in SITE_METRICS]):
        reason = f"{', '.join(of_sites)} cannot be judged: {ratings.note}"
        raise SamplesError(reason, "use other samples, or omit these terms")
    hops = {"teacher": origin_of(loaded).reference(), "compiled": compiled}
    fidelity = verify(hops, {}, ratings.sites, samples, ratings.samples_at_once)
    budget = config.bounds() or budget_of(report, fidelity)
    return hold(Verification(fidelity, budget, ratings.outside, ratings.note), show)


@dataclass(frozen=True)
class Ratings:
    """What is known of the sites of a compiled model on other samples.

    Attributes:
        sites: fidelity by the site's name.
        outside: what lies outside of the calibrated range, by the same, as of `Verification`.
        note: why both are empty: samples on which the loops do not show as they did in calibration, say without
            padding, are good for all else.
        samples_at_once: what memory allows.
    """

    sites: Mapping[str, SiteFidelity] = field(default_factory=dict)
    outside: Mapping[str, Outside | None] = field(default_factory=dict)
    note: str = ""
    samples_at_once: int = BATCH


def rate_sites(
    folder: Path, report: Mapping[str, Any], loaded: LoadedModel, samples: Samples, config: CompileConfig
) -> Ratings:
    """Rate each operator alone, in the teacher's graph on other samples.

    Raises:
        CheckpointError: the parameters in the folder are not those of the report.
    """
    # A graph is captured with two samples or more. Nothing is fitted, so that none have to be held out.
    several = samples if len(samples) > 1 else samples[[0, 0]]
    try:
        teacher = study(loaded, config, lambda loaded, config: (several, several))
    except (CaptureError, SamplesError) as error:
        return Ratings(note=f"sites are not rated, since on these samples {error}")
    sites, stored, at_once = teacher.sites, report["sites"], teacher.graph.samples_at_once(BATCH)
    if not same_loops(sites, stored):
        note = "sites are not rated, since their loops do not show on these samples as they did in calibration"
        return Ratings(note=note, samples_at_once=at_once)
    selection = stored_selection(folder, report, sites)
    try:
        modules = operators(sites, selection)
        fidelities = site_fidelity(teacher.graph, sites, modules, samples)
    except (RuntimeError, IndexError, ValueError) as error:  # shapes that torch cannot bring together
        parameters = Source.at(folder / OPERATORS, CheckpointError)
        raise parameters.refuse(f"its parameters do not fit the model: {one_line(error)}", COMPILE) from error
    ranges = score_ranges(teacher.graph, sites, samples)
    outside: dict[str, Outside | None] = {}
    for site, of_site in zip(sites, stored, strict=True):
        low, high = of_site["calibration_range"]
        spreads = ranges[site.name].deviations
        ranged = not on_all_scores(site, selection)
        outside[site.name] = plans_outside(spreads, low, high, len(samples)) if ranged else None
    return Ratings(fidelities, outside, samples_at_once=at_once)


def stored_selection(folder: Path, report: Mapping[str, Any], sites: Sequence[Site]) -> Selection:
    """Return the operators that a folder holds, for the sites of its teacher, which are those of its report.

    Raises:
        CheckpointError: the parameters in the folder are not those of the report.
    """
    parameters = Source.at(folder / OPERATORS, CheckpointError)
    tensors, pairs = read_safetensors(parameters), zip(sites, report["sites"], strict=True)
    choices = {site.name: Choice(read_choice(parameters, site, of, tensors), "") for site, of in pairs}
    # As it was compiled, whatever the spread of other samples.
    return Selection(choices, frozenset(site["name"] for site in report["sites"] if site["wide"]))


def same_loops(sites: Sequence[Site], stored: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether loops are those of the sites in a report."""
    return len(sites) == len(stored) and all(map(alike, map(site_data, sites), stored))


def alike(site: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Return whether a loop is that of a site in a report.

    What is fitted is fitted head by head. Other operators take any number of heads, which follows the length where
    heads are tokens.
    """
    heads = ["heads"] if stored["choice"]["operator"] == "sliced_dual" else []
    return all(site[name] == stored[name] for name in ("name", "half_steps", "last", "masked", *heads))


def on_all_scores(site: Site, selection: Selection) -> bool:
    """Return whether the operator of a site is its loop, however far the scores spread."""
    operator = selection.choices[site.name].candidate.operator
    return operator == "keep" or (operator == "exact" and (packs(site) or site.name in selection.wide))


def hold(verification: Verification, show: Show) -> Verification:
    """Show a result, then hold it to its budget."""
    show(verification)
    check_budget(verification.fidelity, verification.budget)
    return verification


def budget_of(report: Mapping[str, Any], fidelity: Fidelity) -> tuple[Bound, ...]:
    """Return the budget that a report states, less what these samples cannot tell, and a limit for all outputs."""
    metrics = reached(fidelity)
    bounds = [
        bound
        for bound in map(parse_bound, report["budget"])
        if metrics[bound.metric] is not None and (fidelity.sites or bound.metric not in SITE_METRICS)
    ]
    if not any(bound.metric == "output-error" for bound in bounds):
        compiled = max(report["fidelity"]["outputs"].values(), default=0.0)
        default = next(bound.limit for bound in DEFAULT_BUDGET if bound.metric == "output-error")
        bounds.append(Bound("output-error", max(default, MAX_GROWTH * compiled)))
    return tuple(bounds)


def plans_outside(spreads: Tensor, low: float, high: float, samples: int) -> Outside:
    """Return the plans whose scores spread beyond a range that is widened a little.

    Args:
        spreads: (samples * plans of each,), sample by sample.
        low: end of the range.
        high: the other.
        samples: their number.
    """
    more = WIDENED * (high - low)
    places = ((spreads < low - more) | (spreads > high + more)).nonzero().flatten().tolist()
    each = len(spreads) // samples
    return Outside(len(places), len(spreads), tuple(divmod(place, each) for place in places[:NAMED]))
