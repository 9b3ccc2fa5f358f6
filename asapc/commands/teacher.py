"""Finds the loops of a captured model."""

from dataclasses import replace

from asapc.passes.find.evidence import find_with_evidence
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Findings


def find(graph: CapturedGraph, calibration: Samples) -> Findings:
    """What there is to find in a graph, with the early stops that capturing it has left out."""
    return replace(find_with_evidence(graph, calibration), early_stops=graph.early_stops)
