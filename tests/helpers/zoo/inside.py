"""Sinkhorn loops with something before or after them that changes the scores, or the plan, but not the loop."""

import torch

from .case import Case, Expected
from .layers import Attention, Classifier, tokens
from .reference import merge, sinkhorn, split


class RowMaxColumnsFirst(Attention):
    """Subtracting each row's maximum is no change to softmax, but it is another start to a loop on columns."""

    def plan(self, scores):
        plan = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        for _ in range(self.half_steps // 2):
            plan = plan / plan.sum(dim=-2, keepdim=True)
            plan = plan / plan.sum(dim=-1, keepdim=True)
        return plan


class GatedAfterwards(Attention):
    """A Sinkhorn loop, and then the plan is changed."""

    def plan(self, scores):
        plan = scores
        for _ in range(self.half_steps // 2):
            plan = plan.log_softmax(dim=-2).log_softmax(dim=-1)
        return plan.exp() * torch.sigmoid(scores)


class MixedWithSoftmax(Attention):
    """Half a Sinkhorn plan, half a softmax."""

    def plan(self, scores):
        plan = scores
        for _ in range(self.half_steps // 2):
            plan = plan.log_softmax(dim=-2).log_softmax(dim=-1)
        return 0.5 * plan.exp() + 0.5 * scores.softmax(dim=-1)


def reference(plan):
    def outputs(m, sites, x):
        a, [site] = m.attention, sites
        q, k, v = (split(layer(x), 2) for layer in (a.q, a.k, a.v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 / site.epsilon
        return m.head((x + a.out(merge(plan(scores, site) @ v))).amax(dim=1))

    return outputs


def case(name, attention, half_steps, plan):
    sites = (Expected(half_steps, "rows", 0.4),)
    return Case(name, lambda: Classifier(attention(half_steps)), tokens, sites, reference=reference(plan))


CASES = [
    case(
        "row_max_columns_first",
        RowMaxColumnsFirst,
        4,
        lambda scores, site: sinkhorn(scores - scores.amax(dim=-1, keepdim=True), site),
    ),
    case("gated_afterwards", GatedAfterwards, 6, lambda scores, site: sinkhorn(scores, site) * scores.sigmoid()),
    case(
        "mixed_with_softmax",
        MixedWithSoftmax,
        6,
        lambda scores, site: (sinkhorn(scores, site) + scores.softmax(dim=-1)) / 2,
    ),
]
