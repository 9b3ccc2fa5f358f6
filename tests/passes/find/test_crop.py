"""Long loops are judged on some of their rows and columns, with the same result as on all."""

from dataclasses import fields
from unittest.mock import patch

import pytest
import torch
from helpers.relowering import PROBED, captured
from helpers.zoo import NEGATIVES, POSITIVES
from torch import nn

from asapc.passes.find import crop
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.types.samples import Samples

BATCH = 4
# Of each kind of code one: layouts, domains, masks, plans that are returned, what is no loop.
NAMES = {
    *("keys_remasked", "multi_query_by_equations", "softmax_heads_last", "potentials_in_units_of_cost", "lengths"),
    *("weighted_marginals", "attention_mask", "additive"),
}


def found_in_part(case):
    """Find twice: with axes of the zoo's length cut, and without; say whether anything was cut."""
    torch.manual_seed(0)
    inputs = case.inputs(BATCH, torch.Generator().manual_seed(1))
    graph, samples = captured(case.build().eval(), inputs), Samples(inputs)[:PROBED]
    whole = find_sinkhorn(graph, samples)
    with patch.multiple(crop, LONG=9, KEPT=8, ENDS=2):
        return whole, find_sinkhorn(graph, samples)


def facts(findings):
    """What is known of sites and misses: without what is measured, or matters only up to a factor."""

    def told(value):
        return [f"{number:.5g}" for number in value.tolist()] if isinstance(value, torch.Tensor) else value

    of_sites = []
    for site in findings.sites:
        parts = [site.loop, site.wiring, *([site.wiring.product] if site.wiring.product else [])]
        unknown = {"product", "reach", "column_mass" if site.loop.last == "rows" else "row_mass"}
        of_sites.append([told(getattr(part, f.name)) for part in parts for f in fields(part) if f.name not in unknown])
    return of_sites, [miss.node for miss in findings.misses]


@pytest.mark.parametrize("case", [c for c in POSITIVES + NEGATIVES if c.name in NAMES], ids=lambda case: case.name)
def test_the_same_is_found_in_part(case):
    whole, part = found_in_part(case)
    assert facts(part) == facts(whole)


class Long(nn.Module):
    """One site of more tokens than are looked at."""

    def __init__(self, mean=False):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.by_mean = mean

    def forward(self, x):
        kernel = (self.q(x) @ self.k(x).mT).exp()
        for _ in range(3):
            kernel = kernel / kernel.sum(dim=-1, keepdim=True)
            kernel = kernel / (kernel.mean if self.by_mean else kernel.sum)(dim=-2, keepdim=True)
        return kernel @ self.v(x)


@pytest.mark.parametrize("mean", [False, True])
def test_lengths_and_masses_are_those_of_the_whole(mean):
    samples = Samples({"x": torch.randn(2, crop.LONG + 8, 4)})
    graph = captured(Long(mean).eval(), samples.inputs)
    [site] = find_sinkhorn(graph, samples).sites
    assert (site.loop.queries, site.loop.keys, site.loop.half_steps) == (crop.LONG + 8, crop.LONG + 8, 6)
    assert site.loop.column_mass.item() == pytest.approx(crop.LONG + 8 if mean else 1.0)


def test_a_loop_that_is_another_on_what_is_left_out_is_judged_as_a_whole():
    class Marked(Long):
        def __init__(self):
            super().__init__()
            marks = torch.zeros(crop.LONG + 8)
            marks[crop.places(crop.LONG + 8, crop.KEPT)] = 1
            self.register_buffer("marks", marks)

        def forward(self, x):
            kernel = (self.q(x) @ self.k(x).mT).exp()
            for _ in range(3):
                kernel = kernel / kernel.sum(dim=-1, keepdim=True)
                kernel = kernel / kernel.sum(dim=-2, keepdim=True) * (0.5 + self.marks / 2)
            return kernel @ self.v(x)

    samples = Samples({"x": torch.randn(2, crop.LONG + 8, 4)})
    [site] = find_sinkhorn(captured(Marked().eval(), samples.inputs), samples).sites
    assert sorted(set(site.loop.column_mass.tolist())) == pytest.approx([0.5, 1.0])
