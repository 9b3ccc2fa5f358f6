"""What reads a plan is a use of it: matchers look for its largest entries, costs are summed over it."""

import pytest
import torch
from helpers.attention import QUERIES, WIDTH, find
from helpers.relowering import outputs, worst
from helpers.tolerances import FLOAT32
from torch import nn

from asapc.capturing.export import export
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.operators import exact_operator
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

TURNS = 10


class Matcher(nn.Module):
    """The logarithm of a plan between two sets, and what a head makes of it and of the scores."""

    def __init__(self, head):
        super().__init__()
        self.head, self.features = head, nn.Linear(WIDTH, WIDTH)

    def forward(self, a, b):
        scores = self.features(a) @ self.features(b).mT / 2
        f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
        for _ in range(TURNS):
            f = -(scores + g).logsumexp(-1, keepdim=True)
            g = -(scores + f).logsumexp(-2, keepdim=True)
        return self.head(scores + f + g, scores, b)


def mutual(log_plan, scores, b):
    """Matches that are the best of their row and of their column, as SuperGlue reads them."""
    rows, columns = log_plan[:, :-1, :-1].max(2), log_plan[:, :-1, :-1].max(1)
    places = torch.arange(rows.indices.shape[1])
    is_mutual = places == columns.indices.gather(1, rows.indices)
    return torch.where(is_mutual, rows.values.exp(), 0.0), torch.where(is_mutual, rows.indices, -1)


HEADS = {
    "largest": lambda log_plan, scores, b: (log_plan.max(2).values.exp(), log_plan.max(2).indices),
    "largest_in_both": lambda log_plan, scores, b: (log_plan.amax(1), log_plan.amax(2)),
    "mutual": mutual,
    "argmax": lambda log_plan, scores, b: log_plan.argmax(-1).float(),
    "top_k": lambda log_plan, scores, b: log_plan.topk(2, dim=-1).values,
    "threshold": lambda log_plan, scores, b: (log_plan.exp() > 0.2).float(),
    "cost": lambda log_plan, scores, b: (log_plan.exp() * scores).sum((1, 2)),
    "cost_in_turn": lambda log_plan, scores, b: (scores * log_plan.exp()).sum(-1).mean(-1),
    "cost_of_flat_matrices": lambda log_plan, scores, b: (log_plan.exp() * scores).flatten(1).sum(1),
    "cost_by_einsum": lambda log_plan, scores, b: torch.einsum("bnm,bnm->b", log_plan.exp(), scores),
    "logarithm_and_plan": lambda log_plan, scores, b: (log_plan.max(2).values, log_plan.exp()),
    "logarithm_and_product": lambda log_plan, scores, b: (log_plan.max(2).indices, log_plan.exp() @ b),
    "plan_and_its_block": lambda log_plan, scores, b: (log_plan.exp(), log_plan[:, :-1].max(2).values),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_loop_is_one_site_whatever_reads_it(name):
    torch.manual_seed(0)
    module = Matcher(HEADS[name]).eval()
    inputs = {"a": torch.randn(4, QUERIES, WIDTH), "b": torch.randn(4, QUERIES + 2, WIDTH)}
    graph = CapturedGraph(export(module, Samples(inputs)[:2].inputs), Samples(inputs)[:2])
    [site] = find_sinkhorn(graph, Samples(inputs)).sites
    assert site.loop.half_steps == 2 * TURNS
    changed = RewriteSinkhorn([site], {site.name: exact_operator(site)})(graph.program.module()).program
    fresh = {"a": torch.randn(3, QUERIES, WIDTH), "b": torch.randn(3, QUERIES + 2, WIDTH)}
    assert worst(outputs(changed, fresh), outputs(module, fresh)) < FLOAT32
    assert not changed.graph.find_nodes(op="call_function", target=torch.ops.aten.logsumexp.default)


class Stabilised(nn.Module):
    """A softmax by hand: the largest score is taken off again."""

    def forward(self, x):
        scores = x @ x.mT
        kernel = (scores - scores.amax(-1, keepdim=True)).exp()
        return (kernel / kernel.sum(-1, keepdim=True)) @ x


def test_largest_scores_that_are_taken_off_are_no_use():
    assert find(Stabilised()).sites == ()
