"""Chooses the operator of each site: the cheapest that keeps the budget, at the site and in the whole model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf

from asapc.config import CompileConfig
from asapc.fidelity.budget import judge as judge_budget
from asapc.planning.alternatives import look_up
from asapc.planning.amortise import MIN_PLANS, why_not_amortised
from asapc.planning.cache import Cache
from asapc.planning.check import Check
from asapc.planning.front import closer, front, model_front, relc
from asapc.planning.propose import why_not_sliced
from asapc.types.budget import DEFAULT_BUDGET, SITE_METRICS, Bound, Term, Verdict
from asapc.types.choices import Candidate, Cheaper, Choice, Selection
from asapc.types.costs import CostModel
from asapc.types.results import Fidelity, SiteFidelity
from asapc.types.site import Site
from asapc.types.teacher import Teacher

# Candidates must stay below a limit of the budget by this factor, since other samples differ from those that choose.
MARGIN = 0.9
# Up to this relc the scaling form counts as exact, by the level; beyond, it has left the range of float32. -O1 allows
# rounding alone.
EXACT_RELC = {1: 1e-5, 2: 1e-3}
# Share of the exact form's estimated time that an approximation must save to replace it: an error has to pay.
MIN_SAVING = 0.05
# No operator whose error is as large as what it stands for is worth its time, whatever the budget.
MAX_RELC = 1.0
NOT_CHEAPER = "no approximation is cheaper"
MISSED = "the whole model missed the budget on held-out samples with a cheaper one"


def choose(
    teacher: Teacher,
    config: CompileConfig,
    model: CostModel,
    advance: Callable[[str], None] = lambda detail: None,
    cache: Cache | None = None,
) -> Selection:
    """Select an operator for every site: what `decide` chooses among `find_alternatives`.

    Args:
        teacher: the model, its sites and its samples.
        config: options; the level, the feature sets, the budget and the batches matter here.
        model: the costs to compare by.
        advance: called with a line about the progress.
        cache: where fits are kept; None for nowhere.
    """
    with look_up(teacher, config, model, cache, advance) as check:
        return decide(check, config, advance)


def decide(check: Check, config: CompileConfig, advance: Callable[[str], None] = lambda detail: None) -> Selection:
    """Choose among alternatives.

    Each site gets the cheapest candidate that keeps the budget on calibration samples that were not fitted. If the
    whole model still misses it on held-out samples, the site that gains most for its cost gets a closer operator, again
    and again. A budget that does not mention sites leaves open how close they have to be: the cheapest row of the
    model's front is chosen with which the whole model keeps the budget on held-out samples. Nothing is fitted on those:
    they only decide whether to spend more.

    Args:
        check: the model and its alternatives.
        config: the level and the budget matter here.
        advance: called with a line about the progress.
    """
    if config.level == 0:
        return all_kept(check)
    if config.level == 1 or not config.bounds() or any(bound.metric in SITE_METRICS for bound in config.bounds()):
        return repair(check, selection_of(check, config), config, advance)
    rows = rows_of(check, config)
    cheaper: Cheaper | None = None
    for number, row in enumerate(rows, 1):
        advance(f"checking the whole model, row {number} of {len(rows)}")
        verdict = judge_budget(check(row, of_sites=False), config.bounds())
        if verdict.passed or row is rows[-1]:  # the last misses the budget, which the gate on the compiled model says
            break
        cheaper = missed_by(row, rows[number], verdict)
    return replace(row, cheaper=cheaper)


def all_kept(check: Check) -> Selection:
    """Leave all loops as they are."""
    of_sites = check.alternatives.candidates.items()
    return selection({name: Choice(loops[0], "-O0 leaves all as it is") for name, loops in of_sites}, check)


def selection_of(check: Check, config: CompileConfig, level: float | None = None) -> Selection:
    """Choose for each site by itself, see `choose_operator`."""
    candidates = check.alternatives.candidates
    sites = check.teacher.longest_sites
    return selection({site.name: choose_operator(site, candidates[site.name], config, level) for site in sites}, check)


def selection(choices: Mapping[str, Choice], check: Check) -> Selection:
    """Make a selection of choices."""
    return Selection(choices, check.alternatives.wide, check.alternatives.ranges)


def rows_of(check: Check, config: CompileConfig) -> list[Selection]:
    """List the rows of the whole model's front, from the cheapest to the closest; see `front.model_front`."""
    cheapest, closest = (selection_of(check, config, level) for level in (MAX_RELC, 0.0))
    return model_front(cheapest, closest.choices, MISSED)


def choose_operator(
    site: Site, candidates: Sequence[Candidate], config: CompileConfig, level: float | None = None
) -> Choice:
    """Choose the cheapest candidate that keeps the budget of a site; the exact form where none saves anything.

    Where the exact form is not allowed, the cheapest that keeps the budget, else the closest.

    Args:
        site: the site.
        candidates: the exact form first.
        config: the budget.
        level: relc to keep instead of the budget's.
    """
    exact, *others = candidates
    most = {name: MARGIN * limit for name, limit in site_limits(config).items()}
    if level is not None:
        most = {"relc": level}
    bound = bool(others) and "exact" not in config.kinds()
    saving = others if bound else [c for c in others if c.cost <= (1 - MIN_SAVING) * exact.cost]
    close = [c for c in saving if keeps(c.fidelity, most)]
    curve = tuple(front(saving if bound else [exact, *saving]))
    if bound and not close:
        return Choice(min(others, key=relc), "the closest of the operators that --operators allows", curve)
    if close:
        best = min(close, key=lambda c: (c.cost, c.half_steps))  # of equal cost the shorter, for repeatable choices
        return Choice(best, f"the cheapest with relc at most {most['relc']:.3g} on calibration samples", curve)
    if saving:
        nearest = min(saving, key=lambda c: relc(c))
        why = f"no approximation is close enough, the closest has relc {relc(nearest):.3g} on calibration samples"
    else:
        why = NOT_CHEAPER if others else why_none(site, config)
    if relc(exact) <= EXACT_RELC[config.level]:
        return Choice(exact, "-O1 asks for the exact form" if config.level == 1 else why, curve)
    why = f"{why}; the scaling form leaves the range of float32 (relc {relc(exact):.1e})"
    return Choice(Candidate("keep", site.loop.half_steps, inf), why, curve)


def why_none(site: Site, config: CompileConfig) -> str:
    """Return why a site has no candidates beside the exact form, of the kinds that are allowed."""
    if config.kinds() == {"amortised"}:
        return why_not_amortised(site) or f"a network needs {MIN_PLANS:,} plans to train on, more than there are"
    return why_not_sliced(site) or NOT_CHEAPER


def site_limits(config: CompileConfig) -> dict[str, float]:
    """Return the largest errors that the budget allows a site, by metric; terms of the user replace defaults."""
    return {b.metric: b.limit for b in (*DEFAULT_BUDGET, *config.bounds()) if b.metric in SITE_METRICS}


def keeps(fidelity: SiteFidelity | None, most: Mapping[str, float]) -> bool:
    """Return whether a site's fidelity keeps limits, by the name of the metric; NaN never does."""
    return fidelity is not None and all(getattr(fidelity, SITE_METRICS[name]) <= most[name] for name in most)


def repair(check: Check, selection: Selection, config: CompileConfig, advance: Callable[[str], None]) -> Selection:
    """Spend on closer operators until the whole model keeps the budget on held-out samples, or nothing is left."""
    cheaper = cheaper_at_a_site(selection, config)
    while True:
        advance(f"checking the whole model, {selection.repairs} repairs")
        fidelity = check(selection)
        verdict = judge_budget(fidelity, config.bounds())
        offenders = [] if verdict.passed else sites_that_miss(check.teacher.sites, fidelity, config)
        step = closer(selection, offenders, MISSED)
        if step is None:  # where it misses the budget, the gate on the compiled model will say so
            return replace(selection, cheaper=cheaper)
        cheaper = missed_by(selection, step, verdict)
        selection = step


def missed_by(row: Selection, step: Selection, verdict: Verdict) -> Cheaper:
    """Say of a selection by which terms it misses the budget, beside the next closer one."""
    pairs = {name: (choice.candidate, step.choices[name].candidate) for name, choice in row.choices.items()}
    others = {name: candidate for name, (candidate, closer) in pairs.items() if candidate is not closer}
    return Cheaper(others, row.cost, True, tuple(verdict.missed))


def cheaper_at_a_site(selection: Selection, config: CompileConfig) -> Cheaper | None:
    """Return the selection with one site's next cheaper operator, where that saves least; None without any."""
    limits = site_limits(config)
    options: list[Cheaper] = []
    for name, choice in selection.choices.items():
        below = [candidate for candidate in choice.front if candidate.cost < choice.candidate.cost < inf]
        if below and below[-1].fidelity is not None:
            terms = [Term(Bound(m, limits[m]), getattr(below[-1].fidelity, SITE_METRICS[m])) for m in limits]
            missed = [term for term in terms if not term.reached <= MARGIN * term.bound.limit]
            cost = selection.cost - choice.candidate.cost + below[-1].cost
            options.append(Cheaper({name: below[-1]}, cost, False, tuple(missed), MARGIN))
    return max((option for option in options if option.missed), key=lambda option: option.cost, default=None)


def sites_that_miss(sites: Sequence[Site], fidelity: Fidelity, config: CompileConfig) -> list[str]:
    """Return the names of the sites that miss their own limit; all where none does, since all may be to blame then."""
    metrics = {bound.metric for bound in config.bounds() or DEFAULT_BUDGET}
    limits_of_site = {name: limit for name, limit in site_limits(config).items() if name in metrics}
    offenders = [name for name, of_site in fidelity.sites.items() if not keeps(of_site, limits_of_site)]
    return offenders or [site.name for site in sites]
