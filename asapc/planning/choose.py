"""Chooses the operator of each site: the cheapest that keeps the budget, at the site and in the whole model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, isnan

from asapc.backends.base import RememberingRunner, Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.config import CompileConfig
from asapc.fidelity.budget import judge as judge_budget
from asapc.fidelity.outputs import BATCH, verify
from asapc.fidelity.sites import candidate_fidelity, site_fidelity
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.costs import estimate
from asapc.planning.operators import build, lower, operators
from asapc.planning.propose import enough, propose, split, why_not_sliced
from asapc.planning.ranges import limits, score_ranges, wide_sites
from asapc.types.budget import DEFAULT_BUDGET, SITE_METRICS
from asapc.types.choices import Candidate, Choice, Selection
from asapc.types.graph import CapturedGraph
from asapc.types.options import Lowering
from asapc.types.results import Fidelity, SiteFidelity
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher

# Candidates must stay below a limit of the budget by this factor, since other samples differ from those that choose.
MARGIN = 0.9
# Up to this relc the scaling form counts as exact, by the level; beyond, it has left the range of float32. -O1 allows
# rounding alone.
EXACT_RELC = {1: 1e-5, 2: 1e-3}
# Share of the exact form's estimated time that an approximation must save to replace it: an error has to pay.
MIN_SAVING = 0.05
# Where a budget is about the whole model alone, sites start at this relc, and it is halved LEVELS - 1 times.
MAX_RELC, LEVELS = 0.5, 5


def choose(teacher: Teacher, config: CompileConfig, advance: Callable[[str], None] = lambda detail: None) -> Selection:
    """Select an operator for every site.

    Candidates are the exact scaling form, its truncations, and sliced duals of several feature sets and numbers of
    closure steps; `decide` says how it is chosen among them.

    Args:
        teacher: the model, its sites and its samples.
        config: options; the level, the feature sets, the budget and the batches matter here.
        advance: called with a line about the progress.
    """
    advance("range of the scores")
    sites, samples = teacher.longest_sites, enough(teacher)
    ranges = score_ranges(teacher.graph, sites, samples)
    wide = wide_sites(ranges)
    if config.level == 1 and config.lowering != "fused":
        # -O1 promises the loop on all inputs, not only on scores that spread like those of calibration. Fused passes
        # have no form that is levelled twice.
        wide = frozenset(site.name for site in sites)
    if config.level == 0:
        loops = {s.name: Choice(Candidate("keep", s.loop.half_steps, inf), "-O0 leaves all as it is") for s in sites}
        return Selection(loops, wide, limits(ranges))
    candidates = propose(teacher, config, advance)
    advance(f"comparing {sum(map(len, candidates.values()))} candidates")
    choosing, _ = split(samples)  # fidelity on samples that were fitted would flatter the sliced duals
    candidates = judge(teacher.graph, sites, candidates, wide, choosing, max(config.batches), config.wanted_lowering)
    return decide(teacher, candidates, Selection({}, wide, limits(ranges)), config, advance)


def decide(
    teacher: Teacher,
    candidates: Mapping[str, Sequence[Candidate]],
    empty: Selection,
    config: CompileConfig,
    advance: Callable[[str], None] = lambda detail: None,
) -> Selection:
    """Choose among candidates with cost and fidelity.

    Each site gets the cheapest candidate that keeps the budget on calibration samples that were not fitted. A budget
    that does not mention sites leaves open how close they have to be: their relc is halved until the whole model keeps
    it on held-out samples. If the model still misses it, the site that gains most for its cost gets a closer operator,
    again and again. Nothing is fitted on held-out samples: they only decide whether to spend more.

    Args:
        teacher: the model.
        candidates: by the site's name, the exact form first.
        empty: a selection without choices.
        config: the level and the budget matter here.
        advance: called with a line about the progress.
    """
    sites = teacher.longest_sites
    open_sites = bool(config.bounds()) and not any(bound.metric in SITE_METRICS for bound in config.bounds())
    levels = [MAX_RELC / 2**i for i in range(LEVELS)] if open_sites and config.level == 2 else [None]
    selection = empty
    for halvings, level in enumerate(levels):
        choices = {site.name: choose_operator(site, candidates[site.name], config, level) for site in sites}
        selection = replace(empty, choices=choices, repairs=halvings)
        if level is None or level == levels[-1]:
            break  # `repair` checks this one itself
        advance(f"checking the whole model, relc {level:.3g}")
        if judge_budget(check(teacher, selection), config.bounds()).passed:
            return selection
    return repair(teacher, selection, config, advance)


def judge(
    graph: CapturedGraph,
    sites: Sequence[Site],
    candidates: Mapping[str, Sequence[Candidate]],
    wide: frozenset[str],
    samples: Samples,
    batch: int,
    lowering: Lowering | None = None,
) -> dict[str, list[Candidate]]:
    """Lower the candidates and add cost and fidelity, all of them in one pass over the samples.

    Args:
        graph: the teacher.
        sites: its sites.
        candidates: by the site's name.
        wide: sites whose scores spread far, see `Selection.wide`.
        samples: inputs to compare on.
        batch: samples a call, which the cost depends on.
        lowering: the only lowering to consider; None for the cheapest.
    """
    modules = {
        s.name: {i: lower(s, build(s, c, wide), batch, lowering) for i, c in enumerate(candidates[s.name])}
        for s in sites
    }
    # One pass for all: to run the teacher takes longer than to compare a candidate.
    fidelity = candidate_fidelity(graph, sites, modules, samples)

    def with_facts(site: Site, i: int, candidate: Candidate) -> Candidate:
        module = modules[site.name][i]
        cost = estimate(site, module, batch)
        return replace(candidate, lowering=module.lowering, cost=cost, fidelity=fidelity[site.name][i])

    return {site.name: [with_facts(site, i, c) for i, c in enumerate(candidates[site.name])] for site in sites}


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
    curve = tuple(front(others if bound else [exact, *others]))
    if bound and not close:
        return Choice(min(others, key=relc), "the closest of the operators that --operators allows", curve)
    if close:
        best = min(close, key=lambda c: (c.cost, c.half_steps))  # of equal cost the shorter, for repeatable choices
        return Choice(best, f"the cheapest with relc at most {most['relc']:.3g} on calibration samples", curve)
    if saving:
        nearest = min(saving, key=lambda c: relc(c))
        why = f"no approximation is close enough, the closest has relc {relc(nearest):.3g} on calibration samples"
    else:
        why = why_not_sliced(site) or "no approximation is cheaper"
    if relc(exact) <= EXACT_RELC[config.level]:
        return Choice(exact, "-O1 asks for the exact form" if config.level == 1 else why, curve)
    why = f"{why}; the scaling form leaves the range of float32 (relc {relc(exact):.1e})"
    return Choice(Candidate("keep", site.loop.half_steps, inf), why, curve)


def site_limits(config: CompileConfig) -> dict[str, float]:
    """Return the largest errors that the budget allows a site, by metric; terms of the user replace defaults."""
    return {b.metric: b.limit for b in (*DEFAULT_BUDGET, *config.bounds()) if b.metric in SITE_METRICS}


def relc(candidate: Candidate) -> float:
    """Return the error of a candidate's attention output; not finite counts as infinite."""
    value = inf if candidate.fidelity is None else candidate.fidelity.relc
    return inf if isnan(value) else value  # NaN would break every comparison of a sort


def keeps(fidelity: SiteFidelity | None, most: Mapping[str, float]) -> bool:
    """Return whether a site's fidelity keeps limits, by the name of the metric; NaN never does."""
    return fidelity is not None and all(getattr(fidelity, SITE_METRICS[name]) <= most[name] for name in most)


def front(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield the candidates that no cheaper or equally cheap one beats in error, cheapest first."""
    least = inf
    for candidate in sorted(candidates, key=lambda c: (c.cost, relc(c))):
        if relc(candidate) < least:
            least = relc(candidate)
            yield candidate


def repair(teacher: Teacher, selection: Selection, config: CompileConfig, advance: Callable[[str], None]) -> Selection:
    """Spend on closer operators until the whole model keeps the budget on held-out samples, or nothing is left."""
    while True:
        advance(f"checking the whole model, {selection.repairs} repairs")
        fidelity = check(teacher, selection)
        if judge_budget(fidelity, config.bounds()).passed:
            return selection
        culprits = sites_that_miss(teacher.sites, fidelity, config)
        steps = {name: step for name in culprits if (step := next_step(selection.choices[name])) is not None}
        if not steps:
            return selection  # it misses the budget, which the gate on the compiled model will say
        name = max(steps, key=lambda name: gain(selection.choices[name].candidate, steps[name]))
        why = "the whole model missed the budget on held-out samples with a cheaper one"
        choices = {**selection.choices, name: replace(selection.choices[name], candidate=steps[name], reason=why)}
        selection = replace(selection, choices=choices, repairs=selection.repairs + 1)


def sites_that_miss(sites: Sequence[Site], fidelity: Fidelity, config: CompileConfig) -> list[str]:
    """Return the names of the sites that miss their own limit; all where none does, since all may be to blame then."""
    metrics = {bound.metric for bound in config.bounds() or DEFAULT_BUDGET}
    limits_of_site = {name: limit for name, limit in site_limits(config).items() if name in metrics}
    offenders = [name for name, of_site in fidelity.sites.items() if not keeps(of_site, limits_of_site)]
    return offenders or [site.name for site in sites]


def check(teacher: Teacher, selection: Selection) -> Fidelity:
    """Measure the graph with selected operators on held-out samples, site by site and whole."""
    graph, sites, held_out = teacher.graph, teacher.sites, teacher.held_out
    modules = operators(sites, selection)
    # In torch, without export: whether a selection is close enough does not depend on the runtime.
    compiled = RewriteSinkhorn(sites, modules)(graph.program.module()).program
    captured = RememberingRunner(EagerRunner(graph.program.module()))
    of_sites = site_fidelity(graph, sites, modules, held_out, captured)
    hops: dict[str, Runner] = {"teacher": captured, "amortisation": EagerRunner(compiled)}
    return verify(hops, {}, of_sites, held_out, graph.samples_at_once(BATCH))


def next_step(choice: Choice) -> Candidate | None:
    """Return the next closer candidate on a site's front, None where there is none."""
    closer = [c for c in choice.front if c.cost > choice.candidate.cost and relc(c) < relc(choice.candidate)]
    return closer[0] if closer else None


def gain(now: Candidate, step: Candidate) -> float:
    """Return the squared error that a step removes for each millisecond that it costs."""
    return (relc(now) ** 2 - relc(step) ** 2) / (step.cost - now.cost)
