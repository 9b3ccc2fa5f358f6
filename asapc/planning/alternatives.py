"""What the planner can choose among: operators for each site, fitted, with cost and fidelity."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf

from asapc.config import CompileConfig
from asapc.fidelity.sites import candidate_fidelity
from asapc.planning.cache import Cache, Entry, key_of
from asapc.planning.check import Check
from asapc.planning.costs import estimate
from asapc.planning.distributed import processes_sharing
from asapc.planning.operators import build, lower
from asapc.planning.propose import enough, propose, split
from asapc.planning.ranges import limits, score_ranges, wide_sites
from asapc.types.choices import Alternatives, Candidate
from asapc.types.costs import CostModel
from asapc.types.graph import CapturedGraph
from asapc.types.options import Lowering
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher


@contextmanager
def look_up(
    teacher: Teacher, config: CompileConfig, model: CostModel, cache: Cache | None, advance: Callable[[str], None]
) -> Iterator[Check]:
    """Yield the alternatives of a model, ready to be checked: those of the cache, or new ones, which it then keeps.

    What is checked in the block is kept too.
    """
    if cache is None or config.level == 0 or processes_sharing() > 1:  # all processes must fit, or none
        yield Check(teacher, find_alternatives(teacher, config, model, advance))
        return
    advance("looking into the cache")
    key = key_of(teacher, config, model)
    known = cache.read(key)
    entry = known or Entry(find_alternatives(teacher, config, model, advance))
    check = Check(teacher, entry.alternatives, entry.checks)
    yield check
    if known is None or check.new:
        cache.write(key, entry)


def find_alternatives(
    teacher: Teacher, config: CompileConfig, model: CostModel, advance: Callable[[str], None] = lambda detail: None
) -> Alternatives:
    """Find what the planner can choose among, with cost and fidelity.

    Candidates are the exact scaling form, its truncations, and sliced duals of several feature sets and numbers of
    closure steps. The budget has no part in it.
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
        loops = {site.name: [Candidate("keep", site.loop.half_steps, inf)] for site in sites}
        return Alternatives(loops, wide, limits(ranges))
    candidates = propose(teacher, config, advance)
    advance(f"comparing {sum(map(len, candidates.values()))} candidates")
    choosing, _ = split(samples)  # fidelity on samples that were fitted would flatter the sliced duals
    candidates = judge(
        teacher.graph, sites, candidates, wide, choosing, max(config.batches), model, config.wanted_lowering
    )
    return Alternatives(candidates, wide, limits(ranges))


def judge(
    graph: CapturedGraph,
    sites: Sequence[Site],
    candidates: Mapping[str, Sequence[Candidate]],
    wide: frozenset[str],
    samples: Samples,
    batch: int,
    model: CostModel,
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
        model: the costs.
        lowering: the only lowering to consider; None for the cheapest.
    """
    modules = {
        s.name: {i: lower(s, build(s, c, wide), batch, model, lowering) for i, c in enumerate(candidates[s.name])}
        for s in sites
    }
    # One pass for all: to run the teacher takes longer than to compare a candidate.
    fidelity = candidate_fidelity(graph, sites, modules, samples)

    def with_facts(site: Site, i: int, candidate: Candidate) -> Candidate:
        module = modules[site.name][i]
        cost = estimate(site, module, batch, model)
        return replace(candidate, lowering=module.lowering, cost=cost, fidelity=fidelity[site.name][i])

    return {site.name: [with_facts(site, i, c) for i, c in enumerate(candidates[site.name])] for site in sites}
