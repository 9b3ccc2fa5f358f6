"""Measures selections on held-out samples: whether the whole model, with all operators in it, keeps a budget."""

from collections.abc import Mapping, Sequence

from asapc.backends.base import RememberingRunner, Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.fidelity.outputs import BATCH, verify
from asapc.fidelity.sites import site_fidelity
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import Operator, operators
from asapc.types.choices import Alternatives, Candidate, Selection
from asapc.types.results import Fidelity, SiteFidelity
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
        modules = operators(sites, selection)
        compiled = RewriteSinkhorn(sites, modules)(graph.program.module()).program
        errors = self.site_errors(selection, modules) if of_sites else {}
        hops: dict[str, Runner] = {"teacher": self.captured, "amortisation": EagerRunner(compiled)}
        return verify(hops, {}, errors, held_out, graph.samples_at_once(BATCH))

    def site_errors(self, selection: Selection, modules: Mapping[str, Operator]) -> dict[str, SiteFidelity]:
        """Compare the operators of a selection with their loops; those that are not known yet run."""
        keys = dict(zip(selection.choices, self.numbers(selection), strict=True))
        new = {name: module for name, module in modules.items() if (name, keys[name]) not in self.of_sites}
        if new:
            graph, sites, held_out = self.teacher.graph, self.teacher.sites, self.teacher.held_out
            for name, fidelity in site_fidelity(graph, sites, new, held_out, self.captured).items():
                self.of_sites[name, keys[name]] = fidelity
        return {name: self.of_sites[name, keys[name]] for name in modules}

    def name(self, selection: Selection) -> str:
        """Return what tells a selection from the others: the numbers of its candidates."""
        return " ".join(self.numbers(selection))

    def numbers(self, selection: Selection) -> list[str]:
        """Return the number of the candidate at each site."""
        candidates = self.alternatives.candidates
        return [number(candidates[site], choice.candidate) for site, choice in selection.choices.items()]


def number(candidates: Sequence[Candidate], candidate: Candidate) -> str:
    """Return the number of a candidate, or its operator where a loop is kept, which is not among them."""
    return next((str(i) for i, other in enumerate(candidates) if other is candidate), candidate.operator)
