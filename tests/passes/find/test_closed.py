"""Loops and branches of torch's own kind are named, ahead of all that was looked into."""

import pytest
import torch
from helpers.attention import QUERIES, WIDTH, find, source_text
from torch import nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop


def turn(scores):
    return scores.log_softmax(-1).log_softmax(-2)


def by_while_loop(scores):
    return while_loop(lambda i, s: i < 5, lambda i, s: (i + 1, turn(s)), (torch.tensor(0), scores))[1]


def by_scan(scores):
    return scan(lambda s, none: (turn(s), none.clone()), scores, torch.zeros(5, 1))[0]


def by_map(scores):
    return map_over(turn, scores)


def by_cond(scores):
    return torch.cond(scores.sum() > 0, turn, lambda s: s.log_softmax(-1), (scores,))


def doubled(scores):
    return torch.cond(scores.sum() > 0, lambda s: 2 * s, lambda s: s.clone(), (scores,)).softmax(-1)


class Beside(nn.Module):
    """A softmax, then attention whose log plan some function returns."""

    def __init__(self, log_plan):
        super().__init__()
        self.log_plan, self.to_q = log_plan, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = (x @ x.mT).softmax(-1) @ x
        scores = self.to_q(x) @ x.mT
        plan = self.log_plan(scores).exp()
        return plan @ x


@pytest.mark.parametrize("log_plan", [by_while_loop, by_scan, by_map, by_cond])
def test_a_loop_that_one_node_runs_comes_first_with_its_line(log_plan):
    findings = find(Beside(log_plan), x=torch.randn(3, QUERIES, WIDTH))
    assert findings.sites == ()
    miss = findings.misses[0]
    assert f"what {log_plan.__name__.removeprefix('by_')} runs" in miss.reason
    assert "self.log_plan" in source_text(miss)


def test_a_branch_without_sums_is_none():
    reasons = [miss.reason for miss in find(Beside(doubled), x=torch.randn(3, QUERIES, WIDTH)).misses]
    assert reasons
    assert not any("cond runs" in reason for reason in reasons)
