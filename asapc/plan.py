"""Chooses the operator of each site: the cheapest that comes close enough to the teacher there."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from asapc.artifacts import CapturedGraph, Choice, Plan, Samples, Site, SlicedDualParams
from asapc.calibrate import calibrate
from asapc.config import DEFAULT_BUDGET, CompileConfig
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.results import SiteFidelity
from asapc.verify import site_fidelity

# A limit of the budget is aimed at with this margin, since held-out samples differ from those that choose.
MARGIN = 0.9
EXACT_RELC = 1e-3  # beyond this the scaling form has left the range of float32
MOST_CLOSURE_STEPS = 3
# TensorRT sorts no more than this many elements; longer sites get no slices.
LONGEST_SORT = 3840
MASS_TOLERANCE = 1e-6  # a last marginal within this of the usual one is the usual one
SELECTION_SHARE = 4  # one in so many calibration samples chooses between candidates and is not fitted on


def plan(
    graph: CapturedGraph,
    sites: Sequence[Site],
    samples: Samples,
    config: CompileConfig,
    advance: Callable[[str], None] = lambda detail: None,
) -> Plan:
    """Choose an operator for every site.

    The first candidate that is close enough on samples not fitted on is taken: the sliced dual with 0, 1 ...
    closure steps, for each number of slices in `config.slices`; then the exact scaling form; then the site
    as written. By default there are no slices: at the sizes measured so far (benchmarks/operators.py) a
    closure step gains more than 8 slices and costs less than their sort. A sliced dual with as many
    half-steps as the teacher is no candidate: the exact form is as cheap.

    Args:
        graph: the captured teacher.
        sites: what was found in it.
        samples: calibration samples.
        config: options; slices and the budget matter here.
        advance: called with a line about the progress.
    """
    limits = {bound.metric: MARGIN * bound.limit for bound in (*DEFAULT_BUDGET, *config.bounds())}
    most_relc = limits["relc"]
    most_column_error = limits.get("column-marginal", float("inf"))
    selection = samples[: len(samples) // SELECTION_SHARE]
    fitting = samples[len(samples) // SELECTION_SHARE :]
    choices: dict[str, Choice] = {}
    closest: dict[str, float] = {}

    for slices in config.slices:
        open_sites = [
            site
            for site in sites
            if site.name not in choices
            and why_not_sliced(site) is None
            and (slices == 0 or (max(site.queries, site.keys) <= LONGEST_SORT and not site.masked))
        ]
        if not open_sites:
            continue
        advance(f"fitting {len(open_sites)} sites with {slices} slices")
        fitted = calibrate(graph, open_sites, fitting, slices, MOST_CLOSURE_STEPS, advance)
        for steps in range(1 + MOST_CLOSURE_STEPS):
            half_steps = 2 + 2 * steps
            params = {
                site.name: truncate(fitted[site.name], steps)
                for site in open_sites
                if site.name not in choices and half_steps < site.half_steps
            }
            found = fidelity(graph, sites, params, selection)
            for name, result in found.items():
                closest[name] = min(result.relc, closest.get(name, float("inf")))
                if result.relc <= most_relc and result.column_marginal_error <= most_column_error:
                    why = f"relc {result.relc:.3g} on calibration samples, at most {most_relc:.3g} wanted"
                    choices[name] = Choice("sliced_dual", half_steps, why, params[name])

    rest = [site for site in sites if site.name not in choices]
    exact = site_fidelity(graph, rest, {site.name: exact_operator(site) for site in rest}, selection)
    for site in rest:
        choices[site.name] = fall_back(site, exact[site.name], closest.get(site.name))
    return Plan({site.name: choices[site.name] for site in sites})


def fidelity(
    graph: CapturedGraph, sites: Sequence[Site], params: dict[str, SlicedDualParams], samples: Samples
) -> dict[str, SiteFidelity]:
    """Fidelity of sliced duals by the site's name."""
    operators = {site.name: SlicedDual(params[site.name], site.masked) for site in sites if site.name in params}
    return site_fidelity(graph, sites, operators, samples) if operators else {}


def truncate(params: SlicedDualParams, steps: int) -> SlicedDualParams:
    """Keep the first `steps` closure steps: each was fitted without regard to those after it."""
    return replace(params, weights=params.weights[: 1 + steps])


def fall_back(site: Site, exact: SiteFidelity, closest: float | None) -> Choice:
    """Exact form of a site that no sliced dual serves, or the site as written where even that fails."""
    why = why_not_sliced(site)
    if why is None:
        why = f"no sliced dual is close enough, the closest has relc {closest:.3g} on calibration samples"
    if exact.relc <= EXACT_RELC:
        return Choice("exact", site.half_steps, why)
    return Choice(
        "keep",
        site.half_steps,
        f"{why}; the scaling form leaves the range of float32 (relc {exact.relc:.1e})",
    )


def why_not_sliced(site: Site) -> str | None:
    """Why a sliced dual cannot stand in for a site, None where it can."""
    if site.half_steps <= 2:
        return f"{site.half_steps} half-steps are too few for an approximation to pay"
    if site.last == "columns":
        return "it ends on columns, which sliced duals do not serve yet"
    if site.query is None or site.temperature is None or not bool((site.temperature > 0).all()):
        return "its scores hold no product of queries and keys to slice"
    if not site.uniform:
        return "its marginals are not uniform, which sliced duals do not serve yet"
    if site.logarithm:
        return "it ends in the logarithm of a plan, which sliced duals do not serve yet"
    return None


def exact_operator(site: Site, half_steps: int | None = None) -> nn.Module:
    """Scaling-form Sinkhorn of a site, of its own number of half-steps or of fewer (truncated)."""
    default = 1.0 if site.last == "rows" else site.queries / site.keys
    given = {"rows": site.row_mass, "columns": site.column_mass}
    masses = {
        # On the axis that is not normalised last a common factor is of no consequence.
        f"{axis[:-1]}_mass": mass.to(site.dtype)
        for axis, mass in given.items()
        if mass.numel() > 1 or (axis == site.last and abs(mass.item() / default - 1) > MASS_TOLERANCE)
    }
    return Sinkhorn(half_steps or site.half_steps, site.last, **masses, masked=site.masked, logarithm=site.logarithm)


def operators(sites: Sequence[Site], chosen: Plan) -> dict[str, nn.Module]:
    """The modules that a plan stands for; sites that it keeps have none."""
    modules: dict[str, nn.Module] = {}
    for site in sites:
        choice = chosen.choices[site.name]
        if choice.params is not None:
            modules[site.name] = SlicedDual(choice.params, site.masked)
        elif choice.operator != "keep":
            modules[site.name] = exact_operator(site, choice.half_steps)
    return modules
