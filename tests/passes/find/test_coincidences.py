"""Sizes that happen to be the same: points and features, heads and samples."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.compositions import consistent
from helpers.relowering import captured, outputs, worst
from helpers.slow import slow
from helpers.tolerances import FLOAT64
from helpers.verdicts import drawn, judged
from torch import nn

from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.samples import Samples

SCORES = {
    "norms": lambda q, k: 2 * q @ k.mT - q.square().sum(-1, keepdim=True) - k.square().sum(-1)[..., None, :],
    "differences": lambda q, k: -(q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1),
    "transposed": lambda q, k: -(q.mT.unsqueeze(-1) - k.mT.unsqueeze(-2)).square().sum(-3),
    "cdist": lambda q, k: -torch.cdist(q, k),
    "cosines": lambda q, k: 4 * F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1),
    "softmax_features": lambda q, k: 4 * q.softmax(-1) @ k.softmax(-1).mT,
}
POINTS_FEATURES_HEADS = [(6, 6, 1), (2, 2, 2), (4, 8, 2), (6, 3, 6)]


class Distances(nn.Module):
    def __init__(self, scores, features, heads):
        super().__init__()
        self.scores, self.heads = scores, heads
        self.q, self.k, self.v = (nn.Linear(heads * features, heads * features) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        log_plan = SCORES[self.scores](q, k) / 0.5
        for _ in range(3):
            log_plan = log_plan.log_softmax(-1).log_softmax(-2)
        return (log_plan.exp() @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("points", "features", "heads"), POINTS_FEATURES_HEADS)
@pytest.mark.parametrize("scores", SCORES)
def test_points_may_be_as_many_as_features_or_heads(scores, points, features, heads):
    torch.manual_seed(0)
    module = Distances(scores, features, heads).double().eval()
    x = torch.randn(5, points, heads * features, dtype=torch.float64)
    graph = captured(module, {"x": x[:2]})
    findings = find_sinkhorn(graph, Samples({"x": x[:2]}))
    assert [(site.loop.half_steps, site.loop.last) for site in findings.sites] == [(6, "columns")], findings.misses
    exact = {site.name: exact_operator(site) for site in findings.sites}
    changed = RewriteSinkhorn(findings.sites, exact)(graph.program.module()).program
    assert worst(outputs(changed, {"x": x}), outputs(module, {"x": x})) < FLOAT64


@pytest.mark.parametrize("number", [*range(0, 20, 2), *map(slow, range(20, 80, 2))])
def test_random_models_are_found_whose_sizes_are_all_four(number):
    composition = consistent(replace(drawn(number), tokens=4, heads=4, cross=False))
    verdict = judged(composition)
    assert verdict.kind == "right", (composition, verdict)
