"""Measures selections on held-out samples: whether the whole model, with all operators in it, keeps a budget."""

from collections.abc import Sequence

from asapc.backends.base import RememberingRunner, Runner
from asapc.backends.eager.runner import EagerRunner
from asapc.fidelity.outputs import BATCH, verify
from asapc.fidelity.sites import site_fidelity
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import operators
from asapc.types.choices import Alternatives, Candidate, Selection
from asapc.types.results import Fidelity
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
        errors = site_fidelity(graph, sites, modules, held_out, self.captured) if of_sites else {}
        hops: dict[str, Runner] = {"teacher": self.captured, "amortisation": EagerRunner(compiled)}
        return verify(hops, {}, errors, held_out, graph.samples_at_once(BATCH))

    def name(self, selection: Selection) -> str:
        """Return what tells a selection from the others: the numbers of its candidates."""
        candidates = self.alternatives.candidates
        return " ".join(number(candidates[site], choice.candidate) for site, choice in selection.choices.items())


def number(candidates: Sequence[Candidate], candidate: Candidate) -> str:
    """Return the number of a candidate, or its operator where a loop is kept, which is not among them."""
    return next((str(i) for i, other in enumerate(candidates) if other is candidate), candidate.operator)
