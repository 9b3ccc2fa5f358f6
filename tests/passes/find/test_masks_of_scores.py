"""Masks of any pattern that scores bring along, from which no row or column is ever wholly left out."""

import math

import pytest
import torch
from helpers.relowering import captured, outputs, worst
from torch import nn

from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.samples import Samples

POINTS = 8


def window(scores, mask, low):
    band = torch.ones(POINTS, POINTS, dtype=torch.bool).tril(2).triu(-1)
    return scores.masked_fill(~band, low)


def self_loops(scores, mask, low):
    near = mask[:, None, :, None] & mask[:, None, None, :] | torch.eye(POINTS, dtype=torch.bool)
    return torch.where(near, scores, low)


def bins(scores, mask, low):
    """Matchers have a row and a column more, for what matches nothing, which no mask reaches."""
    scores = scores.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), low)
    return nn.functional.pad(scores, (0, 1, 0, 1), value=0.3)


def best(scores, mask, low):
    return scores.masked_fill(scores < scores.topk(3, dim=-1).values[..., -1:], low)


class Masked(nn.Module):
    def __init__(self, pattern, low):
        super().__init__()
        self.pattern, self.low = pattern, low
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, mask):
        q, k, v = (layer(x).unflatten(-1, (2, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        log_plan = self.pattern(q @ k.mT / 0.7, mask, self.low)
        for _ in range(3):
            log_plan = log_plan - log_plan.logsumexp(-2, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(-1, keepdim=True)
        return (log_plan.exp()[..., :POINTS, :POINTS] @ v).transpose(1, 2).flatten(2)


def found(pattern, low):
    torch.manual_seed(0)
    module = Masked(pattern, low).double().eval()
    x = torch.randn(6, POINTS, 12, dtype=torch.float64)
    inputs = {"x": x, "mask": torch.rand(6, POINTS) < 0.7}
    graph = captured(module, {name: value[:2] for name, value in inputs.items()})
    samples = Samples({name: value[:2] for name, value in inputs.items()})
    return module, inputs, graph, find_sinkhorn(graph, samples)


@pytest.mark.parametrize("low", [-math.inf, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("pattern", [window, self_loops, bins], ids=lambda pattern: pattern.__name__)
def test_the_exact_form_starts_from_the_masked_scores(pattern, low):
    module, inputs, graph, findings = found(pattern, low)
    [site] = findings.sites
    assert (site.loop.half_steps, site.loop.last, site.loop.masked) == (6, "rows", False)
    for wide in (False, True):
        changed = RewriteSinkhorn([site], {site.name: exact_operator(site, wide=wide)})(graph.program.module()).program
        for scale in (0.3, 1.0, 3.0):
            scaled = {**inputs, "x": scale * inputs["x"]}
            assert worst(outputs(changed, scaled), outputs(module, scaled)) < 1e-9, (wide, scale)


def test_a_mask_that_may_leave_a_column_empty_is_refused():
    *_, findings = found(best, -1e9)
    assert findings.sites == ()
    [miss] = findings.misses
    assert "not in whole rows and columns" in miss.reason
