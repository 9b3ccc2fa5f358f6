"""Chooses the operator of each site: the cheapest that keeps the budget, at the site and in the whole model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from asapc.backends.eager.runner import EagerRunner
from asapc.config import CompileConfig
from asapc.fidelity.budget import missed
from asapc.fidelity.outputs import verify
from asapc.fidelity.sites import candidate_fidelity, site_fidelity
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.costs import estimate
from asapc.planning.operators import build, lower, operators
from asapc.planning.propose import propose, split, why_not_sliced
from asapc.planning.ranges import limits, score_ranges, wide_sites
from asapc.types.budget import DEFAULT_BUDGET, SITE_METRICS
from asapc.types.choices import Candidate, Choice, Plan
from asapc.types.graph import CapturedGraph
from asapc.types.options import Lowering
from asapc.types.results import Fidelity, SiteFidelity
from asapc.types.samples import Samples
from asapc.types.site import Site

# A limit of the budget is aimed at with this margin, since other samples differ from those that choose.
MARGIN = 0.9
# The scaling form counts as exact up to here; beyond it has left the range of float32. With -O1 rounding is all
# that is allowed.
EXACT_RELC = {1: 1e-5, 2: 1e-3}
# What an approximation has to save, as estimated, before it is taken instead of the exact form.
MIN_SAVING = 0.05
# Where a budget is about the whole model alone, sites may be so far from the teacher at first, then half as far, and so
# on.
MAX_RELC, LEVELS = 0.5, 5


def plan(
    graph: CapturedGraph,
    sites: Sequence[Site],
    samples: Samples,
    held_out: Samples,
    config: CompileConfig,
    advance: Callable[[str], None] = lambda detail: None,
) -> Plan:
    """Choose an operator for every site.

    Candidates are the exact scaling form, its truncations, and sliced duals of several feature sets and numbers of
    closure steps; `decide` says how it is chosen among them.

    Args:
        graph: the captured teacher.
        sites: what was found in it.
        samples: calibration samples.
        held_out: samples to check the whole model on.
        config: options; the level, the feature sets, the budget and the batches matter here.
        advance: called with a line about the progress.
    """
    advance("range of the scores")
    ranges = score_ranges(graph, sites, samples)
    wide = wide_sites(ranges)
    if config.level == 0:
        kept = {s.name: Choice(Candidate("keep", s.loop.half_steps, inf), "-O0 leaves all as it is") for s in sites}
        return Plan(kept, wide, limits(ranges))
    candidates = propose(graph, sites, samples, config, advance)
    advance(f"comparing {sum(map(len, candidates.values()))} candidates")
    selection, _ = split(samples)
    costed = judge(graph, sites, candidates, wide, selection, max(config.batches), config.wanted_lowering)
    return decide(graph, sites, costed, Plan({}, wide, limits(ranges)), held_out, config, advance)


def decide(
    graph: CapturedGraph,
    sites: Sequence[Site],
    candidates: Mapping[str, Sequence[Candidate]],
    empty: Plan,
    held_out: Samples,
    config: CompileConfig,
    advance: Callable[[str], None] = lambda detail: None,
) -> Plan:
    """Choose among candidates with cost and fidelity.

    At each site the cheapest is taken that keeps the budget on calibration samples that were not fitted. A budget that
    says nothing about sites leaves open how close they have to be: they get closer by halves until the whole model
    keeps it on held-out samples. Where it is missed still, the site where that helps most for what it costs gets a
    closer operator, again and again. Nothing is fitted on held-out samples; they decide no more than whether to spend
    on.

    Args:
        graph: the captured teacher.
        sites: its sites.
        candidates: by the site's name, the exact form first.
        empty: a plan without choices.
        held_out: samples to check the whole model on.
        config: the level and the budget matter here.
        advance: called with a line about the progress.
    """
    open_sites = bool(config.bounds()) and not any(bound.metric in SITE_METRICS for bound in config.bounds())
    levels = [MAX_RELC / 2**i for i in range(LEVELS)] if open_sites and config.level == 2 else [None]
    chosen = empty
    for tightened, level in enumerate(levels):
        choices = {site.name: choose(site, candidates[site.name], config, level) for site in sites}
        chosen = replace(empty, choices=choices, repairs=tightened)
        if level is None or level == levels[-1]:
            break  # which repair checks itself
        advance(f"checking the whole model, relc {level:.3g}")
        if not missed(check(graph, sites, chosen, held_out), config.bounds()):
            return chosen
    return repair(graph, sites, chosen, held_out, config, advance)


def judge(
    graph: CapturedGraph,
    sites: Sequence[Site],
    candidates: Mapping[str, Sequence[Candidate]],
    wide: frozenset[str],
    samples: Samples,
    batch: int,
    wanted: Lowering | None = None,
) -> dict[str, list[Candidate]]:
    """The candidates lowered, with cost and fidelity, all of them in one pass over the samples."""
    modules = {
        s.name: {
            i: lower(s, build(s, candidate, wide), batch, wanted) for i, candidate in enumerate(candidates[s.name])
        }
        for s in sites
    }
    found = candidate_fidelity(graph, sites, modules, samples)

    def judged(site: Site, i: int, candidate: Candidate) -> Candidate:
        module, fidelity = modules[site.name][i], found[site.name][i]
        return replace(candidate, lowering=module.lowering, cost=estimate(site, module, batch), fidelity=fidelity)

    return {site.name: [judged(site, i, c) for i, c in enumerate(candidates[site.name])] for site in sites}


def choose(site: Site, candidates: Sequence[Candidate], config: CompileConfig, level: float | None = None) -> Choice:
    """The cheapest candidate that keeps the budget of a site, the exact form where none saves anything.

    Args:
        site: the site.
        candidates: what there is, the exact form first.
        config: the budget.
        level: relc to keep in the place of the budget's.
    """
    exact, *others = candidates
    most = {name: MARGIN * limit for name, limit in site_limits(config).items()} if level is None else {"relc": level}
    saving = [c for c in others if c.cost <= (1 - MIN_SAVING) * exact.cost]
    close = [c for c in saving if keeps(c.fidelity, most)]
    curve = tuple(front([exact, *others]))
    if close:
        best = min(close, key=lambda c: (c.cost, c.half_steps))
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
    """What the budget allows a site, by the name of the metric."""
    return {b.metric: b.limit for b in (*DEFAULT_BUDGET, *config.bounds()) if b.metric in SITE_METRICS}


def relc(candidate: Candidate) -> float:
    """Error of a candidate's attention output; not finite counts as infinite."""
    value = inf if candidate.fidelity is None else candidate.fidelity.relc
    return value if value == value else inf


def keeps(fidelity: SiteFidelity | None, most: Mapping[str, float]) -> bool:
    """Whether a site's fidelity keeps limits by the name of the metric; nan never does."""
    return fidelity is not None and all(getattr(fidelity, SITE_METRICS[name]) <= most[name] for name in most)


def front(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Candidates that no cheaper one, or equally cheap one, is closer than; cheapest first."""
    least = inf
    for candidate in sorted(candidates, key=lambda c: (c.cost, relc(c))):
        if relc(candidate) < least:
            least = relc(candidate)
            yield candidate


def repair(
    graph: CapturedGraph,
    sites: Sequence[Site],
    chosen: Plan,
    held_out: Samples,
    config: CompileConfig,
    advance: Callable[[str], None],
) -> Plan:
    """Spend on closer operators until the whole model keeps the budget on held-out samples, or nothing is left."""
    while True:
        advance(f"checking the whole model, {chosen.repairs} repairs")
        fidelity = check(graph, sites, chosen, held_out)
        if not missed(fidelity, config.bounds()):
            return chosen
        # A site that misses its own limit comes first; else all may be to blame.
        named = {bound.metric for bound in config.bounds() or DEFAULT_BUDGET}
        most = {name: limit for name, limit in site_limits(config).items() if name in named}
        blamed = [s.name for s in sites if s.name in fidelity.sites and not keeps(fidelity.sites[s.name], most)]
        steps = {
            site.name: step
            for site in sites
            if (not blamed or site.name in blamed) and (step := next_step(chosen.choices[site.name])) is not None
        }
        if not steps:
            return chosen
        name = max(steps, key=lambda name: gain(chosen.choices[name].candidate, steps[name]))
        why = "the whole model missed the budget on held-out samples with a cheaper one"
        choices = {**chosen.choices, name: replace(chosen.choices[name], candidate=steps[name], reason=why)}
        chosen = replace(chosen, choices=choices, repairs=chosen.repairs + 1)


def check(graph: CapturedGraph, sites: Sequence[Site], chosen: Plan, samples: Samples) -> Fidelity:
    """Fidelity of the graph with a plan's operators, site by site and whole."""
    replaced = operators(sites, chosen)
    module = RewriteSinkhorn(sites, replaced)(graph.program.module()).program
    hops = {"teacher": EagerRunner(graph.program.module()), "amortisation": EagerRunner(module)}
    return verify(hops, {}, site_fidelity(graph, sites, replaced, samples), samples)


def next_step(choice: Choice) -> Candidate | None:
    """The next closer candidate on a site's front, None where there is none."""
    closer = [c for c in choice.front if c.cost > choice.candidate.cost and relc(c) < relc(choice.candidate)]
    return closer[0] if closer else None


def gain(now: Candidate, step: Candidate) -> float:
    """Squared error that a step takes away for each millisecond that it costs."""
    return (relc(now) ** 2 - relc(step) ** 2) / (step.cost - now.cost)
