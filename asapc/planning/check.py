"""Measures selections on held-out samples: whether the whole model, with all operators in it, keeps a budget."""

from collections.abc import Sequence

from asapc.backends.base import RememberingRunner, Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.fidelity.outputs import BATCH, verify
from asapc.fidelity.sites import candidate_fidelity
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import Operator, build, operators
from asapc.types.choices import Alternatives, Candidate, Selection
from asapc.types.results import Fidelity, SiteFidelity
from asapc.types.site import Site
from asapc.types.teacher import Teacher


class Check:
    """Measures selections among some alternatives on held-out samples, each once.

    Attributes:
        results: what was measured, by the `name` of the selection; without sites where nobody asked for them.
        new: whether anything was, beside what was known before.
    """

    def __init__(
        self, teacher: Teacher, alternatives: Alternatives, results: dict[str, Fidelity] | None = None
    ) -> None:
        self.teacher, self.alternatives = teacher, alternatives
        self.results = {} if results is None else results
        self.new = False
        # Each operator is compared alone, so that it is as close in every selection: by the site and the candidate.
        self.of_sites: dict[tuple[str, str], SiteFidelity] = {}
        # The loops as written take longest, and are the same for all selections.
        self.captured = RememberingRunner(EagerRunner(teacher.graph.program.module()))

    def __call__(self, selection: Selection, of_sites: bool = True) -> Fidelity:
        """Measure the graph with selected operators, whole and, where asked, site by site.

        In torch, without export: whether a selection is close enough does not depend on the runtime.
        """
        name = self.name(selection)
        if name not in self.results or (of_sites and not self.results[name].sites):
            self.results[name], self.new = self.measure(selection, of_sites), True
        return self.results[name]

    def measure(self, selection: Selection, of_sites: bool) -> Fidelity:
        """Measure a selection that is not known yet."""
        graph, sites, held_out = self.teacher.graph, self.teacher.sites, self.teacher.held_out
        compiled = RewriteSinkhorn(sites, operators(sites, selection))(graph.program.module()).program
        errors = self.site_errors(selection) if of_sites else {}
        hops: dict[str, Runner] = {"teacher": self.captured, "amortisation": EagerRunner(compiled)}
        return verify(hops, {}, errors, held_out, graph.samples_at_once(BATCH))

    def site_errors(self, selection: Selection) -> dict[str, SiteFidelity]:
        """Compare the operators of a selection with their loops; those that are not known yet run."""
        sites = [site for site in self.teacher.sites if selection.choices[site.name].candidate.operator != "keep"]
        keys = {site.name: self.key(site.name, selection.choices[site.name].candidate) for site in sites}
        if any(key not in self.of_sites for key in keys.values()):
            self.compare(sites, selection)
        return {name: self.of_sites[key] for name, key in keys.items()}

    def compare(self, sites: Sequence[Site], selection: Selection) -> None:
        """Compare what a selection has at sites, in one pass; after the first also what closer ones may have there.

        The loops as written run again in each pass, and take longer than all operators.
        """
        new: dict[str, dict[tuple[str, str], Operator]] = {}
        for site in sites:
            choice = selection.choices[site.name]
            candidates = [choice.candidate, *(choice.front if self.of_sites else ())]
            named = {self.key(site.name, candidate): candidate for candidate in candidates}
            unknown = {key: c for key, c in named.items() if c.operator != "keep" and key not in self.of_sites}
            if unknown:
                new[site.name] = {key: build(site, c, selection.wide) for key, c in unknown.items()}
        graph, held_out = self.teacher.graph, self.teacher.held_out
        for of_site in candidate_fidelity(graph, sites, new, held_out, self.captured).values():
            self.of_sites |= of_site

    def name(self, selection: Selection) -> str:
        """Return what tells a selection from the others: the numbers of its candidates."""
        return " ".join(self.key(site, choice.candidate)[1] for site, choice in selection.choices.items())

    def key(self, site: str, candidate: Candidate) -> tuple[str, str]:
        """Return the name of a site and the number of a candidate there, or its operator where the loop is kept."""
        known = enumerate(self.alternatives.candidates[site])
        return site, next((str(i) for i, other in known if other is candidate), candidate.operator)
