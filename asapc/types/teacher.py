"""A model that has been studied: captured, its loops recognised, with samples to fit and to check on."""

from collections.abc import Sequence
from dataclasses import dataclass

from asapc.types.graph import CapturedGraph
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples
from asapc.types.site import Findings, Site


@dataclass(frozen=True, eq=False)
class Teacher:
    """The result of `commands.study.study`, from which selection, rewrite and checks start.

    Attributes:
        loaded: the model.
        calibration: samples for fitting.
        held_out: samples to check on; no stage fits on them.
        graph: the model with the lengths of the samples, its plans built.
        findings: the sites in that graph, and the near misses.
        open_graph: the model with all its open axes; `graph` where the batch alone is open.
        open_sites: the sites in that graph, in the order of `sites`.
        longest_sites: the sites as they are where all axes are as long as they may be, which operators are selected
            for.
    """

    loaded: LoadedModel
    calibration: Samples
    held_out: Samples
    graph: CapturedGraph
    findings: Findings
    open_graph: CapturedGraph
    open_sites: Sequence[Site]
    longest_sites: Sequence[Site]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in `graph`."""
        return self.findings.sites
