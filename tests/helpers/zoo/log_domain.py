"""Loops in the log domain, each as somebody else would write it."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, Expected
from .layers import TOKENS, Attention, Classifier, tokens
from .reference import classifier


class ColumnsThenRows(Attention):
    def plan(self, scores):
        for _ in range(self.half_steps // 2):
            scores = scores - torch.logsumexp(scores, dim=-2, keepdim=True)
            scores = scores - torch.logsumexp(scores, dim=-1, keepdim=True)
        return scores.exp()


class RowsThenColumns(Attention):
    def plan(self, scores):
        for _ in range(self.half_steps // 2):
            scores = F.log_softmax(scores, dim=-1)
            scores = F.log_softmax(scores, dim=-2)
        return torch.exp(scores)


class OneAxisATime(Attention):
    def plan(self, log_p):
        for i in range(self.half_steps):
            log_p = log_p.log_softmax(dim=3 if i % 2 == 0 else 2)
        return log_p.exp()


def sinkhorn_log(log_alpha, n_steps, dims=(-2, -1)):
    """Normalises dims[0], dims[1], dims[0], ..."""
    for step in range(n_steps):
        log_alpha = log_alpha - log_alpha.logsumexp(dims[step % 2], True)
    return log_alpha.exp()


class HelperFunction(Attention):
    def plan(self, scores):
        return sinkhorn_log(scores, self.half_steps)


class SinkhornLayer(nn.Module):
    def __init__(self, n_iters, temperature):
        super().__init__()
        self.n_iters, self.temperature = n_iters, temperature

    def forward(self, logits):
        z = logits / self.temperature
        for _ in range(self.n_iters):
            z = z - z.logsumexp(dim=-1, keepdim=True)
            z = z - z.logsumexp(dim=-2, keepdim=True)
        return torch.exp(z - z.logsumexp(dim=-1, keepdim=True))  # tidy up: rows sum to 1


class NestedModule(Attention):
    def __init__(self, half_steps):
        super().__init__(half_steps)
        self.normalise = SinkhornLayer(half_steps // 2, self.epsilon)

    def mix(self, scores, v):
        return torch.matmul(self.normalise(scores), v)


class IncrementalPotentials(Attention):
    """Costs, potentials that take on what is missing, marginals 1/n, one axis a turn, times n in the end."""

    def plan(self, scores):
        cost = -scores
        n = cost.shape[-1]
        mu = torch.empty_like(cost[..., 0]).fill_(1.0 / n)
        nu = torch.empty_like(cost[..., 0, :]).fill_(1.0 / n)
        u, v = torch.zeros_like(mu), torch.zeros_like(nu)
        for i in range(self.half_steps):
            if i % 2 == 0:
                u = torch.log(mu) - torch.logsumexp(self.M(cost, u, v), dim=-1) + u
            else:
                v = torch.log(nu) - torch.logsumexp(self.M(cost, u, v).transpose(-2, -1), dim=-1) + v
        return torch.exp(self.M(cost, u, v)) * n

    def M(self, cost, u, v):
        return -cost + u.unsqueeze(-1) + v.unsqueeze(-2)


class PotentialsInUnitsOfCost(Attention):
    """The textbook: f and g carry epsilon, the plan has mass 1, nobody multiplies by n."""

    def mix(self, scores, v):
        C, eps = -scores, self.epsilon
        b, h, n, m = C.shape
        log_a, log_b = -math.log(n), -math.log(m)
        f, g = C.new_zeros(b, h, n, 1), C.new_zeros(b, h, 1, m)
        for _ in range(self.half_steps // 2):
            f = eps * (log_a - ((g - C) / eps).logsumexp(dim=-1, keepdim=True))
            g = eps * (log_b - ((f - C) / eps).logsumexp(dim=-2, keepdim=True))
        return torch.exp((f + g - C) / eps) @ v


class ByHandLogSumExp(Attention):
    @staticmethod
    def lse(x, dim):
        top, _ = x.max(dim=dim, keepdim=True)
        return top + (x - top).exp().sum(dim=dim, keepdim=True).log()

    def plan(self, scores):
        for _ in range(self.half_steps // 2):
            scores = scores - self.lse(scores, 2)
            scores = scores - self.lse(scores, 3)
        return scores.exp()


class SoftmaxOfLogs(Attention):
    """Back and forth between the domains."""

    def plan(self, scores):
        p = torch.softmax(scores, dim=-1)
        for _ in range(self.half_steps // 2 - 1):
            p = torch.softmax(torch.log(p), dim=-2)
            p = torch.softmax(torch.log(p), dim=-1)
        return torch.log(p).softmax(dim=-2)


class SoftmaxWithKeyBias(Attention):
    """The last half-step on rows is a softmax of the scores plus the potential of the keys."""

    def plan(self, scores):
        g = torch.zeros_like(scores[:, :, :1, :])  # B H 1 M
        for _ in range(self.half_steps // 2):
            f = -torch.logsumexp(scores + g, dim=-1, keepdim=True)  # B H N 1
            g = -torch.logsumexp(scores + f, dim=-2, keepdim=True)
        return torch.softmax(scores + g, dim=-1)


class Folded(Attention):
    """No loop in sight."""

    def plan(self, scores):
        dims = [-1, -2] * (self.half_steps // 2) + [-1] * (self.half_steps % 2)
        return functools.reduce(torch.log_softmax, dims, scores).exp()


class Unrolled(Attention):
    def plan(self, scores):
        scores = scores.log_softmax(-2)
        scores = scores.log_softmax(-1)
        scores = scores.log_softmax(-2)
        return scores.log_softmax(-1).exp()


class Transposing(Attention):
    """Normalises the last axis only, and turns the matrix over in between: after an even number it lies as before."""

    def plan(self, scores):
        for _ in range(self.half_steps):
            scores = scores.log_softmax(dim=-1).transpose(-2, -1)
        return scores.exp()


class Stacked(Attention):
    """Both potentials in one list, updates written as minus the log of a mean."""

    def plan(self, scores):
        duals = [torch.zeros_like(scores.sum(-1)), torch.zeros_like(scores.sum(-2))]
        for i in range(self.half_steps):
            side = (i + 1) % 2  # keys first
            total = scores + duals[0][..., :, None] + duals[1][..., None, :]
            mean = torch.logsumexp(total, dim=-1 - side) - math.log(TOKENS)
            duals[side] = duals[side] - mean
        return torch.exp(scores + duals[0][..., :, None] + duals[1][..., None, :]) / TOKENS


class Averaged(Attention):
    """log(mean(exp)) in place of log(sum(exp)): the plan's sums are n until the end."""

    def plan(self, scores):
        for _ in range(self.half_steps // 2):
            scores = scores - (scores.logsumexp(-2, keepdim=True) - math.log(scores.size(-2)))
            scores = scores - (scores.logsumexp(-1, keepdim=True) - math.log(scores.size(-1)))
        return scores.exp() / scores.size(-1)


def case(name, attention, half_steps, last, factor=1.0, **options):
    reference = functools.partial(classifier, factor=factor)
    expected = Expected(half_steps, last, options.get("epsilon", 0.4))
    build = functools.partial(attention, half_steps, **options)
    return Case(name, lambda: Classifier(build()), tokens, (expected,), reference=reference)


CASES = [
    case("columns_then_rows", ColumnsThenRows, 20, "rows"),
    case("two_half_steps", ColumnsThenRows, 2, "rows"),
    case("a_hundred_half_steps", ColumnsThenRows, 100, "rows", epsilon=0.15),
    case("rows_then_columns", RowsThenColumns, 10, "columns"),
    case("one_axis_a_time", OneAxisATime, 7, "rows"),
    case("three_half_steps", OneAxisATime, 3, "rows"),
    case("helper_function", HelperFunction, 5, "columns"),
    case("nested_module", NestedModule, 9, "rows"),
    case("incremental_potentials", IncrementalPotentials, 5, "rows"),
    case("incremental_potentials_even", IncrementalPotentials, 4, "columns"),
    case("potentials_in_units_of_cost", PotentialsInUnitsOfCost, 12, "columns", factor=1 / TOKENS),
    case("by_hand_logsumexp", ByHandLogSumExp, 6, "rows"),
    case("softmax_of_logs", SoftmaxOfLogs, 6, "columns"),
    case("softmax_with_key_bias", SoftmaxWithKeyBias, 13, "rows"),
    case("folded", Folded, 11, "rows"),
    case("unrolled", Unrolled, 4, "rows"),
    case("transposing", Transposing, 8, "columns"),
    case("stacked_duals", Stacked, 7, "columns"),
    case("averaged", Averaged, 8, "rows"),
]
