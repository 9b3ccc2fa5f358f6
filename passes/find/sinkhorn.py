"""Finds Sinkhorn attention in a graph, whatever its code looks like.

Structure proposes (`candidates.py`), numbers decide (`probe.py`). The graph runs once on real samples. At each
candidate for a plan, the nodes that its loop may start from are tried in order: the product of queries and keys, that
with a bias, that with a mask. The loop starts at the first from which the region up to the plan is Sinkhorn scaling,
in numbers. Names of classes, modules and functions play no part; they only label the result.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from asapc.ops.scaling import MIN_LIVE
from asapc.passes.find.alternation import ALTERNATES, alternates
from asapc.passes.find.candidates import PlanCandidate, is_raised, propose
from asapc.passes.find.closed import closed_misses
from asapc.passes.find.crop import CutDown, WholeNeededError, confirm, cut_down, whole_where_it_fails
from asapc.passes.find.describe import describe, module_path, source_line
from asapc.passes.find.explain import explain
from asapc.passes.find.frames import Frame, frames
from asapc.passes.find.guards import find_guard
from asapc.passes.find.kinds import maker
from asapc.passes.find.probe import (
    MASKED_LATER,
    SOFTMAX,
    Live,
    NotSinkhorn,
    difference,
    find_scale,
    is_causal,
    never_empty,
    probe,
    require_precision,
)
from asapc.passes.find.products import as_product
from asapc.passes.find.regions import OpenRegionError, Region
from asapc.passes.find.requirements import (
    UNEXPLAINED,
    require_evidence,
    require_guard,
    require_own,
    require_steps,
    require_uniform,
)
from asapc.passes.find.stopwatch import NodeTimer, time_nodes
from asapc.passes.record import record
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Findings, Miss, Site

# Scores are multiplied by these where the plan's smallest entries are zero even in float64.
MILD = (0.1, 0.01)


def find_sinkhorn(graph: CapturedGraph, samples: Samples, skipped: Collection[str] = ()) -> Findings:
    """Find the Sinkhorn attention sites of a graph.

    Args:
        graph: the captured model; it is not changed.
        samples: two real inputs or more, for the probe on real scores.
        skipped: names of nodes that no loop is to start from.

    Returns:
        The sites in the order of the graph, and the reason for each candidate that was rejected.
    """
    module = graph.program.module()
    candidates = [without(candidate, skipped) for candidate in propose(module.graph)]
    if cut := cut_down(candidates, graph):
        with suppress(WholeNeededError):
            return Finder(module, candidates, len(samples), cut).find(samples)
    return Finder(module, candidates, len(samples)).find(samples)


def without(candidate: PlanCandidate, skipped: Collection[str]) -> PlanCandidate:
    """Return a candidate without some of its starts."""
    return replace(candidate, starts=tuple(start for start in candidate.starts if start.name not in skipped))


class Finder(NodeTimer):
    """Runs a graph once and judges each candidate as soon as its plan is computed, so that few values are kept."""

    def __init__(
        self, module: GraphModule, candidates: Sequence[PlanCandidate], batch: int, cut: CutDown | None = None
    ) -> None:
        super().__init__(module)
        self.batch, self.cut = batch, cut or CutDown()
        self.whole = {node for c in candidates if c.plan.name not in self.cut.candidates for node in c.evidence}
        # Candidates are judged at the operand of a use, those nearest to it first: the others lie before them.
        self.candidates: dict[Node, list[PlanCandidate]] = {}
        for candidate in candidates:
            for use in sorted(candidate.uses, key=lambda use: len(use.path)):
                self.candidates.setdefault(use.path[-1], []).append(candidate)
        self.verdicts: dict[Node, bool] = {}  # whether a plan is a site's
        self.last_use: dict[Node, Node] = {}  # where the value of a node is needed for the last time
        for node in module.graph.nodes:
            for candidate in self.candidates.get(node, ()):
                self.last_use |= dict.fromkeys(candidate.evidence, node)
        self.releases: dict[Node, list[Node]] = {}  # the inverse of `last_use`
        for node, end in self.last_use.items():
            self.releases.setdefault(end, []).append(node)
        self.values: dict[Node, Any] = {}
        self.ends: dict[str, Tensor] = {}  # whole values for the first sample, of nodes that are judged in part
        self.sites: list[tuple[PlanCandidate, Site]] = []
        self.misses: list[tuple[PlanCandidate, Miss]] = []
        self.untold: list[str] = []

    def find(self, samples: Samples) -> Findings:
        """Run the graph on samples and return what was found."""
        self.samples = samples
        with torch.no_grad():
            self.run(*samples.inputs.values(), enable_io_processing=False)
        return self.findings()

    def run_node(self, n: Node) -> Any:
        """Run one node; judge the candidates whose use begins at it."""
        value = super().run_node(n)
        if n in self.last_use:
            self.values |= ({n: value} if n in self.whole else {}) | self.cut.values(n, value)
            if n.name in self.cut.ends:  # where heads are in the batch, all samples are kept
                self.ends[n.name] = value[:1].clone() if len(value) == self.batch else value
        plans: list[Node] = []
        for candidate in sorted(self.candidates.get(n, ()), key=lambda c: c.plan, reverse=True):
            if any(all(plan in use.path for use in candidate.uses) for plan in plans):
                continue  # a stage of that plan's loop
            if candidate.plan not in self.verdicts:
                self.verdicts[candidate.plan] = self.judge(candidate)
            if self.verdicts[candidate.plan]:
                plans.append(candidate.plan)
        for node in self.releases.get(n, ()):
            self.values.pop(node, None)
            self.ends.pop(node.name, None)
            self.values.pop(self.cut.nodes.get(node.name, node), None)
        return value

    def judge(self, candidate: PlanCandidate) -> bool:
        """Add a candidate to the sites, or to the misses where it looks like attention; return whether it is a site."""
        short = self.cut.candidates.get(candidate.plan.name, candidate)  # itself where nothing is long
        try:
            with nullcontext() if short is candidate else whole_where_it_fails():
                site = self.cut.whole(identify(short, self.values, self.batch))
            if short is not candidate:
                confirm(site, self.whole_values(site))
            self.sites.append((candidate, site))
        except NotSinkhorn as reason:
            self.untold += reason.untold
            repeated = reason.nearness != SOFTMAX and alternates(candidate)
            plan = self.values[short.plan]
            # A matrix with negative entries looks like no attention, nor does one that no product reads, unless it was
            # scaled over both axes.
            positive = bool((plan >= 0).all())
            attends = positive and any(as_product(use.user) for use in candidate.uses)
            is_scaled = positive and reason.nearness != SOFTMAX and alternates(candidate, least=2)
            if attends or repeated or is_scaled:
                line = source_line(candidate.uses[0].user if attends else maker(candidate.plan))
                nearness = reason.nearness + (ALTERNATES if repeated else 0)
                self.misses.append((candidate, Miss(candidate.plan.name, line, str(reason), reason.hint, nearness)))
            return False
        return True

    def whole_values(self, site: Site) -> Mapping[str, Tensor]:
        """Return the scores and the plan of a site that was judged in part, for the first sample at least."""
        names = {site.wiring.scores.node, site.wiring.plan.node}
        return self.ends if names <= self.ends.keys() else record(self.module, self.samples[:1], names)

    def findings(self) -> Findings:
        """Return sites and misses, without those that are only a stage of another site's loop."""
        inside: set[Node] = set().union(*(c.region - {c.plan} for c, _ in self.sites))
        plans = {candidate.plan for candidate, _ in self.sites}
        sites = [(candidate, site) for candidate, site in self.sites if not is_stage(candidate, plans, inside)]
        # What is computed from the plan of a site, its exponential say, reads that site.
        sites = [
            (candidate, site)
            for candidate, site in sites
            if not any(c.plan in candidate.region - {candidate.plan} and loop_of(s) == loop_of(site) for c, s in sites)
        ]
        carriers = {node for candidate, _ in sites for use in candidate.uses for node in use.path}
        places = {(site.source, site.name) for _, site in sites}
        misses = self.distinct_misses(inside | carriers, places)
        return Findings(tuple(self.name_sites(sites)), tuple(misses), untold=tuple(dict.fromkeys(self.untold)))

    def name_sites(self, sites: Sequence[tuple[PlanCandidate, Site]]) -> Iterator[Site]:
        """Yield sites with unique names and with their share of the time."""
        seconds = time_nodes(self.module, self.samples, self.seconds) if sites else {}
        total = sum(seconds.values())
        names: set[str] = set()
        for candidate, site in sites:
            name = unique(site.name, names)
            names.add(name)
            share = sum(seconds[node] for node in candidate.region) / total
            yield replace(site, name=name, share=share)

    def distinct_misses(self, nodes: Collection[Node], places: Collection[tuple[str | None, str]]) -> list[Miss]:
        """Return one miss for each line of code that reads a plan, the nearest to a loop first.

        Args:
            nodes: nodes of sites; a candidate whose plan is among them is a part of the site.
            places: source lines and modules of sites; a line may hold more than one loop.
        """
        nearest: dict[str, Miss] = {}
        for candidate, miss in self.misses:
            use = candidate.uses[0]
            if candidate.plan not in nodes and (miss.source, module_path(use.user)) not in places:
                read = source_line(use.user) or use.path[-1].name
                other = nearest.setdefault(read, miss)  # the one nearest to the use was judged first
                if miss.nearness > max(other.nearness, ALTERNATES):
                    nearest[read] = miss
        misses = [*nearest.values(), *closed_misses(self.graph)]
        return sorted(misses, key=lambda miss: miss.nearness, reverse=True)


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate read in one way: from one start, in one layout.

    Attributes:
        candidate: the candidate.
        start: the node that the loop starts from.
        frame: the layout of scores and plan.
        region: the loop as a function of the start's value.
        value: the start's value, float64.
        plan: the region's value for it, float64.
        logarithm: whether the plan node holds log(plan).
    """

    candidate: PlanCandidate
    start: Node
    frame: Frame
    region: Region
    value: Tensor
    plan: Tensor
    logarithm: bool

    def judge(self, values: Mapping[Node, Any]) -> Site:
        """Return the site, its name not yet made unique.

        Raises:
            NotSinkhorn: read in this way it is no site.
        """
        candidate, start, frame = self.candidate, self.start, self.frame
        scores = frame.arrange(self.value.log() if self.region.exponential else self.value)
        plan = self.arrange_plan(self.plan)
        scale, live = self.find_scale(scores, plan)
        explanation = explain(self.region)
        respond = partial(self.respond, ideal=explanation.ideal)
        try:
            ideal = respond(scores) if explanation.ideal else plan
            loop = probe(scores, ideal, scale, live, respond, explanation.reductions, explanation.in_range)
        except NotSinkhorn:
            require_steps(explanation)  # what acts on sharper scores
            raise
        require_evidence(candidate, values)
        require_steps(explanation)
        require_own(self.region, self.value, self.plan)
        require_uniform(self.region, loop)
        if not candidate.cut:  # of a part, the model has computed no plan
            require_precision(values[candidate.plan].double(), self.plan)
        if explanation.ideal:
            guard, reach = find_guard(loop, scores, explanation.floors, self.respond, respond)
            loop = replace(loop, guard=guard, reach=reach)
            require_guard(loop, explanation, difference(plan, ideal))
        return describe(candidate, start, frame, loop, values, self.region.exponential, self.logarithm)

    def find_scale(self, scores: Tensor, plan: Tensor) -> tuple[Tensor, Live]:
        """Return what `probe.find_scale` says; where entries of the plan are zero, of other scores.

        Milder ones show whether they underflow, ordinary ones instead of those whether they are a mask of the
        scores, such as a window, that the loop itself knows nothing of.
        """
        try:
            return find_scale(scores, plan)
        except NotSinkhorn as reason:
            failure = reason
        zero = plan == 0
        if not bool(zero.any()):
            raise failure
        for factor in MILD:
            with suppress(NotSinkhorn):
                return find_scale(factor * scores, self.respond(factor * scores))
        if never_empty(plan) and not is_causal(plan):
            with suppress(NotSinkhorn):
                unmasked = torch.where(zero, scores[~zero].mean(), scores)
                scale, live = find_scale(unmasked, self.respond(unmasked))
                if bool((scores * scale[:, None, None] < MIN_LIVE)[zero].all()):
                    return scale, live
        raise failure

    def respond(self, scores: Tensor, ideal: Mapping[Node, tuple[Any, ...]] | None = None) -> Tensor:
        """Return the plan that the loop makes of other scores, both (B, H, N, M) in float64.

        Args:
            scores: the scores.
            ideal: arguments of nodes, as in `explain.Explanation`.
        """
        value = self.frame.restore(scores)
        return self.arrange_plan(self.region(value.exp() if self.region.exponential else value, ideal))

    def arrange_plan(self, value: Tensor) -> Tensor:
        """Return the plan (B, H, N, M) from a value of its node."""
        return self.frame.arrange(value.exp() if self.logarithm else value)


def trials(candidate: PlanCandidate, values: Mapping[Node, Any], batch: int, exponential: bool) -> Iterator[Trial]:
    """Yield the ways to read a candidate: by start, in the order of the graph, and by layout."""
    logarithm = bool((values[candidate.plan] < 0).any())
    for start in candidate.starts:
        value = values[start].double()
        if exponential and bool((value < 0).any()):
            continue
        region = Region(start, candidate.plan, candidate.region, values, exponential)
        try:
            plan = region(value)
        except OpenRegionError:
            continue
        for frame in frames(candidate, values[candidate.plan].shape, batch):
            yield Trial(candidate, start, frame, region, value, plan, logarithm)


def identify(candidate: PlanCandidate, values: Mapping[Node, Any], batch: int) -> Site:
    """Judge one candidate; return its site, its name not yet made unique, or raise NotSinkhorn."""
    if is_same_everywhere(values[candidate.plan]):
        raise NotSinkhorn(
            "the plan is constant on the samples, so the loop cannot be identified",
            "use other samples that are not wholly masked",
            untold=(candidate.plan.name,),
        )
    failure = NotSinkhorn(
        "no matrix before the plan has its shape",
        "if this is a Sinkhorn loop, build its plan for each sample, a matrix of the scores' shape, and multiply that",
        nearness=-1,
    )
    limited: Site | None = None
    softmax: NotSinkhorn | None = None
    for exponential in (False, True):
        # exp(scores) may start the loop only where what is done to the kernel stood in the way.
        in_the_way = limited is not None or failure.nearness in (MASKED_LATER, UNEXPLAINED)
        starts = [s for s in candidate.starts if not exponential or in_the_way or is_raised(s)]
        for trial in trials(replace(candidate, starts=tuple(starts)), values, batch, exponential):
            try:
                site = trial.judge(values)
            except NotSinkhorn as reason:
                if reason.nearness == SOFTMAX and not is_raised(trial.start):
                    softmax = softmax or reason
                failure = max(failure, reason, key=lambda error: error.nearness)  # the first of equals
            else:
                if site.loop.exact:
                    return site
                # What a loop without guards does not see, such as a norm beside a product, may be in a later start.
                limited = limited or site
    if limited is None:
        raise softmax or failure  # a softmax is one whatever is done to the scores before
    return limited


def is_same_everywhere(value: Any) -> bool:
    """Return whether a value is a tensor of several entries that are all equal."""
    return isinstance(value, Tensor) and value.numel() > 1 and bool((value == value.flatten()[0]).all())


def is_stage(candidate: PlanCandidate, plans: set[Node], inside: Collection[Node]) -> bool:
    """Return whether all uses of a plan lie inside other loops, or come from one of some other plans."""
    sources = [plans & set(use.path[1:]) for use in candidate.uses if use.user not in inside]
    return not sources or bool(set.intersection(*sources))


def loop_of(site: Site) -> tuple[str, int, str]:
    """Return what tells the loop of a site from others of its graph."""
    return site.wiring.scores.node, site.loop.half_steps, site.loop.last


def unique(name: str, others: Collection[str]) -> str:
    """Return a name, with a number appended where others have it."""
    return next(n for n in chain([name], (f"{name}.{i}" for i in count(2))) if n not in others)
