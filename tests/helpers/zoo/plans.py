"""Loops whose plan is the end, or goes elsewhere than into a product with values; scores that are no q.k."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, Expected
from .layers import CLASSES, HEADS, TOKENS, WIDTH, linear, tokens
from .reference import merge, sinkhorn, split

OTHERS, EXPERTS = 12, 4  # points in the second set; experts


def two_sets(batch, generator):
    return {
        "a": torch.randn(batch, TOKENS, WIDTH, generator=generator),
        "b": torch.randn(batch, OTHERS, WIDTH, generator=generator),
    }


class Matching(nn.Module):
    """Which of a goes with which of b, softly."""

    def __init__(self):
        super().__init__()
        self.describe = linear(WIDTH, WIDTH, 1.6)

    def forward(self, a, b):
        scores = torch.einsum("bnd,bmd->bnm", self.describe(a), self.describe(b)) / WIDTH**0.5
        for _ in range(6):
            scores = scores - torch.logsumexp(scores, dim=1, keepdim=True)
            scores = scores - torch.logsumexp(scores, dim=2, keepdim=True)
        return scores.exp()


def matching_reference(m, sites, a, b):
    return sinkhorn(m.describe(a) @ m.describe(b).mT / WIDTH**0.5, sites[0])


class Dustbin(nn.Module):
    """A row and a column more for what goes with nothing, of a score that is learned; it may take all the mass."""

    def __init__(self, log=False):
        super().__init__()
        self.log = log
        self.describe = linear(WIDTH, WIDTH, 1.6)
        self.dustbin = nn.Parameter(torch.tensor(1.0))

    def augment(self, scores):
        b, n, m = scores.shape
        scores = torch.cat([scores, self.dustbin.expand(b, n, 1)], dim=2)
        return torch.cat([scores, self.dustbin.expand(b, 1, m + 1)], dim=1)

    def forward(self, a, b):
        scores = self.describe(a) @ self.describe(b).transpose(1, 2) / WIDTH**0.5
        n, m = scores.shape[1:]
        Z = self.augment(scores)  # B N+1 M+1
        log_mu = torch.cat([torch.zeros(n), torch.tensor([math.log(m)])])
        log_nu = torch.cat([torch.zeros(m), torch.tensor([math.log(n)])])
        u, v = torch.zeros_like(Z[:, :, 0]), torch.zeros_like(Z[:, 0])
        for _ in range(10):
            u = log_mu - torch.logsumexp(Z + v[:, None, :], dim=2)
            v = log_nu - torch.logsumexp(Z + u[:, :, None], dim=1)
        Z = Z + u[:, :, None] + v[:, None, :]
        return Z if self.log else Z.exp()


def dustbin_reference(m, sites, a, b):
    Z = m.augment(m.describe(a) @ m.describe(b).mT / WIDTH**0.5)
    mu, nu = torch.ones(TOKENS + 1), torch.ones(OTHERS + 1)
    mu[-1], nu[-1] = OTHERS, TOKENS
    plan = sinkhorn(Z, sites[0], mu=mu, nu=nu)
    return plan.log() if m.log else plan


class Routing(nn.Module):
    """Tokens to experts, as many to each as it has room for; the plan weighs what the experts say."""

    def __init__(self, capacity):
        super().__init__()
        self.router = linear(WIDTH, EXPERTS, 2.5)
        self.experts = nn.ModuleList([linear(WIDTH, WIDTH) for _ in range(EXPERTS)])
        self.register_buffer("capacity", torch.tensor(capacity))
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        plan = self.router(x).softmax(dim=-1)  # B N E
        for _ in range(4):
            plan = plan * self.capacity / plan.sum(dim=1, keepdim=True)
            plan = plan / plan.sum(dim=2, keepdim=True)
        said = torch.stack([expert(x) for expert in self.experts], dim=2)  # B N E C
        return self.head((plan.unsqueeze(-1) * said).sum(dim=2).amax(dim=1))


def routing_reference(m, sites, x):
    plan = sinkhorn(m.router(x), sites[0], nu=m.capacity)
    said = torch.stack([expert(x) for expert in m.experts], dim=2)
    return m.head(torch.einsum("bne,bnec->bnc", plan, said).amax(dim=1))


class Clusters(nn.Module):
    """Features to clusters, with a dustbin that is dropped before the features are summed."""

    def __init__(self):
        super().__init__()
        self.assign = nn.Sequential(linear(WIDTH, 32, 2.0), nn.ReLU(), linear(32, 6, 2.0))
        self.dustbin = nn.Parameter(torch.tensor(0.5))
        self.head = linear(6 * WIDTH, CLASSES)

    def scores(self, x):
        scores = self.assign(x).transpose(1, 2)  # B K N
        return torch.cat([scores, self.dustbin.expand(x.shape[0], 1, x.shape[1])], dim=1)

    def forward(self, x):
        plan = self.scores(x)
        for _ in range(3):
            plan = plan.log_softmax(dim=-1)
            plan = plan.log_softmax(dim=-2)
        return self.head((plan.exp()[:, :-1] @ x).flatten(1))


def clusters_reference(m, sites, x):
    plan = sinkhorn(m.scores(x), sites[0])
    return m.head((plan[:, :-1] @ x).flatten(1))


class Permutation(nn.Module):
    """A soft permutation from a layer's answer; noise in training only."""

    def __init__(self, tau=0.5):
        super().__init__()
        self.tau = tau
        self.score = linear(WIDTH, TOKENS, 1.3)

    def forward(self, x):
        log_alpha = self.score(x)  # B N N
        if self.training:
            log_alpha = log_alpha - torch.log(-torch.log(torch.rand_like(log_alpha)))
        log_alpha = log_alpha / self.tau
        for _ in range(20):
            log_alpha = log_alpha - torch.logsumexp(log_alpha, dim=2, keepdim=True)
            log_alpha = log_alpha - torch.logsumexp(log_alpha, dim=1, keepdim=True)
        return log_alpha.exp()


def permutation_reference(m, sites, x):
    return sinkhorn(m.score(x) / m.tau, sites[0])


class Sorts(Permutation):
    """The same permutation, put to use from the other side: its columns are the rows of what meets x."""

    def forward(self, x):
        return super().forward(x).transpose(1, 2) @ x


def sorts_reference(m, sites, x):
    return sinkhorn(m.score(x).mT / m.tau, sites[0]) @ x


class TransportCost(nn.Module):
    """The distance between two sets: the plan meets the cost, entry by entry."""

    def __init__(self):
        super().__init__()
        self.embed = linear(WIDTH, 4)

    def forward(self, a, b):
        a, b = self.embed(a), self.embed(b)
        C = (a[:, :, None, :] - b[:, None, :, :]).square().sum(dim=-1)  # B N M
        K = torch.exp(-C / 1.5)
        v = torch.full_like(C[:, 0, :], 1 / C.shape[2])
        for _ in range(8):
            u = 1 / C.shape[1] / torch.einsum("bnm,bm->bn", K, v)
            v = 1 / C.shape[2] / torch.einsum("bnm,bn->bm", K, u)
        plan = torch.einsum("bn,bnm,bm->bnm", u, K, v)
        return (plan * C).sum(dim=(1, 2)), plan


def cost_reference(m, sites, a, b):
    C = torch.cdist(m.embed(a), m.embed(b)).square()
    plan = sinkhorn(-C / 1.5, sites[0]) / OTHERS
    return (plan * C).sum(dim=(1, 2)), plan


class Distances(nn.Module):
    """Attention by distance: the scores are minus the squared distances of queries and keys."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (linear(WIDTH, WIDTH) for _ in range(3))
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = -torch.cdist(q, k).pow(2) / 3.0
        for _ in range(4):
            scores = F.log_softmax(scores, dim=-2)
            scores = F.log_softmax(scores, dim=-1)
        return self.head((scores.exp() @ v).transpose(1, 2).flatten(2).amax(dim=1))


def distances_reference(m, sites, x):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    squared = (q[..., :, None, :] - k[..., None, :, :]).square().sum(dim=-1)
    return m.head(merge(sinkhorn(-squared / 3.0, sites[0]) @ v).amax(dim=1))


class WeightedMarginals(nn.Module):
    """Attention whose tokens have a mass of their own, learned from the tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(WIDTH, WIDTH, 2.2), linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.mass, self.head = linear(WIDTH, 1), linear(WIDTH, CLASSES)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        log_nu = self.mass(x).log_softmax(dim=1).transpose(1, 2) + math.log(x.shape[1])  # B 1 M
        log_plan = q @ k.transpose(1, 2) / WIDTH**0.5
        for _ in range(3):
            log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True) + log_nu
            log_plan = log_plan - log_plan.logsumexp(dim=2, keepdim=True)
        return self.head((log_plan.exp() @ v).amax(dim=1))


def weighted_reference(m, sites, x):
    nu = TOKENS * m.mass(x).squeeze(-1).softmax(dim=1)
    scores = m.q(x) @ m.k(x).mT / WIDTH**0.5 / sites[0].epsilon
    return m.head((sinkhorn(scores, sites[0], nu=nu) @ m.v(x)).amax(dim=1))


class AdditiveScores(nn.Module):
    """Additive attention: a small network scores every pair."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(WIDTH, 8), linear(WIDTH, 8), linear(WIDTH, WIDTH)
        self.score, self.head = linear(8, 1, 4.0), linear(WIDTH, CLASSES)

    def forward(self, x):
        e = self.score(torch.tanh(self.q(x)[:, :, None] + self.k(x)[:, None])).squeeze(-1)  # B N N
        p = e.exp()
        for _ in range(3):
            p = p / p.sum(2, keepdim=True)
            p = p / p.sum(1, keepdim=True)
        return self.head(torch.bmm(p, self.v(x)).amax(dim=1))


def additive_scores_reference(m, sites, x):
    e = m.score(torch.tanh(m.q(x)[:, :, None] + m.k(x)[:, None])).squeeze(-1)
    return m.head((sinkhorn(e, sites[0]) @ m.v(x)).amax(dim=1))


class TalkingHeads(nn.Module):
    """The heads exchange their scores before the loop: each plan is one of a mixture."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(WIDTH, WIDTH, 2.2), linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.talk, self.head = linear(HEADS, HEADS, 2.0), linear(WIDTH, CLASSES)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for _ in range(3):
            scores = scores.log_softmax(dim=-2)
            scores = scores.log_softmax(dim=-1)
        return self.head((scores.exp() @ v).transpose(1, 2).flatten(2).amax(dim=1))


def talking_reference(m, sites, x):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    scores = torch.einsum("gh,bhij->bgij", m.talk.weight, q @ k.mT) / q.shape[-1] ** 0.5
    return m.head(merge(sinkhorn(scores, sites[0]) @ v).amax(dim=1))


class BothWays(nn.Module):
    """One plan, read from either side: what b says to a, and what a says to b."""

    def __init__(self):
        super().__init__()
        self.to_a, self.to_b = linear(WIDTH, WIDTH, 1.5), linear(WIDTH, WIDTH, 1.5)
        self.value_a, self.value_b = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.head = linear(2 * WIDTH, CLASSES)

    def forward(self, a, b):
        plan = torch.exp(self.to_a(a) @ self.to_b(b).transpose(1, 2) / WIDTH**0.5)
        for _ in range(4):
            plan = plan / plan.sum(dim=1, keepdim=True)
            plan = plan / plan.sum(dim=2, keepdim=True)
        heard_by_a = plan @ self.value_b(b)
        heard_by_b = plan.transpose(1, 2) @ self.value_a(a)
        return self.head(torch.cat([heard_by_a.amax(dim=1), heard_by_b.amax(dim=1)], dim=-1))


def both_ways_reference(m, sites, a, b):
    plan = sinkhorn(m.to_a(a) @ m.to_b(b).mT / WIDTH**0.5, sites[0])
    heard = (plan @ m.value_b(b)).amax(dim=1), (plan.mT @ m.value_a(a)).amax(dim=1)
    return m.head(torch.cat(heard, dim=-1))


def case(name, build, reference, half_steps, last, epsilon=None, kind="plan", inputs=tokens):
    return Case(name, build, inputs, (Expected(half_steps, last, epsilon, kind),), reference=reference)


CASES = [
    case("matching", Matching, matching_reference, 12, "rows", 1.0, inputs=two_sets),
    case("dustbin", Dustbin, dustbin_reference, 20, "columns", inputs=two_sets),
    case("dustbin_log", lambda: Dustbin(log=True), dustbin_reference, 20, "columns", inputs=two_sets),
    case("routing_balanced", lambda: Routing([4.0] * 4), routing_reference, 9, "rows"),
    case("routing_by_capacity", lambda: Routing([8.0, 4.0, 2.0, 2.0]), routing_reference, 9, "rows"),
    case("clusters", Clusters, clusters_reference, 6, "columns"),
    case("permutation", Permutation, permutation_reference, 40, "columns"),
    case("sorts", Sorts, sorts_reference, 40, "rows", kind="attention"),
    case("transport_cost", TransportCost, cost_reference, 16, "columns", inputs=two_sets),
    case("distances", Distances, distances_reference, 8, "rows", kind="attention"),
    case("weighted_marginals", WeightedMarginals, weighted_reference, 6, "rows", 1.0, kind="attention"),
    case("talking_heads", TalkingHeads, talking_reference, 6, "rows", kind="attention"),
    case("both_ways", BothWays, both_ways_reference, 8, "rows", 1.0, kind="attention", inputs=two_sets),
    case("additive_scores", AdditiveScores, additive_scores_reference, 6, "columns", kind="attention"),
]
