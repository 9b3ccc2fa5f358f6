"""Loops that end when they have converged, or so it says: each branches on values of tensors."""

import math

import torch

from .case import Case, Expected
from .layers import Attention, Classifier, tokens
from .reference import classifier


class StopsEarly(Attention):
    def __init__(self, half_steps, epsilon, tol):
        super().__init__(half_steps, epsilon)
        self.tol = tol


class Item(StopsEarly):
    """Looks at the change of each half-step; may stop on either axis."""

    def plan(self, scores):
        C = -scores
        n = C.shape[-1]
        u, v = torch.zeros_like(C[..., 0]), torch.zeros_like(C[..., 0, :])
        for i in range(self.half_steps):
            u_before, v_before = u, v
            if i % 2 == 0:
                u = -math.log(n) - torch.logsumexp(-C + u.unsqueeze(-1) + v.unsqueeze(-2), dim=-1) + u
                err = (u - u_before).abs().mean()
            else:
                v = -math.log(n) - torch.logsumexp(-C + u.unsqueeze(-1) + v.unsqueeze(-2), dim=-2) + v
                err = (v - v_before).abs().mean()
            if err.item() < self.tol:
                break
        return torch.exp(-C + u.unsqueeze(-1) + v.unsqueeze(-2)) * n


class While(StopsEarly):
    def plan(self, scores):
        plan, it, err = scores.exp(), 0, torch.tensor(math.inf)
        while err > self.tol and it < self.half_steps // 2:
            plan = plan / plan.sum(dim=-2, keepdim=True)
            plan = plan / plan.sum(dim=-1, keepdim=True)
            err = (plan.sum(dim=-2) - 1).abs().max()
            it += 1
        return plan


class AllClose(StopsEarly):
    def plan(self, scores):
        for _ in range(self.half_steps // 2):
            before = scores
            scores = scores.log_softmax(dim=-1).log_softmax(dim=-2)
            if torch.allclose(scores, before, rtol=0.0, atol=self.tol):
                break
        return scores.exp()


class All(StopsEarly):
    """Waits for every sample and head."""

    def plan(self, scores):
        log_plan = scores.log_softmax(dim=-1)
        for _ in range(self.half_steps // 2):
            log_plan = log_plan.log_softmax(dim=-2)
            log_plan = log_plan.log_softmax(dim=-1)
            err = (log_plan.exp().sum(dim=-2) - 1).abs().mean(dim=-1)  # B H
            if (err < self.tol).all():
                break
        return log_plan.exp()


class Max(StopsEarly):
    """Scaling vectors; looks at every second iteration only."""

    def plan(self, scores):
        K = scores.exp()
        u = torch.ones_like(K[..., :1])
        for i in range(self.half_steps // 2):
            before = u
            v = 1 / (K.mT @ u)
            u = 1 / (K @ v)
            err = (u / before - 1).abs()
            if i % 2 and torch.max(err) < self.tol:
                break
        return u * K * v.mT


class Returns(StopsEarly):
    """Leaves the function from inside the loop."""

    def plan(self, scores):
        f = torch.zeros_like(scores[..., :1])
        for i in range(self.half_steps // 2):
            g = -(scores + f).logsumexp(-2, keepdim=True)
            f_next = -(scores + g).logsumexp(-1, keepdim=True)
            done = torch.linalg.vector_norm(f_next - f).item() <= self.tol * f.numel() ** 0.5
            f = f_next
            if done or i == self.half_steps // 2 - 1:
                return (scores + f + g).exp()
        raise AssertionError


def case(name, attention, half_steps, last, tol, epsilon=0.4):
    sites = (Expected(half_steps, last, epsilon),)
    build = lambda: Classifier(attention(half_steps, epsilon, tol))  # noqa: E731
    return Case(name, build, tokens, sites, early_stop=True, reference=classifier)


# Tolerances above 1e-6 stop the loop for some inputs, those below for none.
CASES = [
    case("stops_by_item", Item, 5, "rows", 1e-12),
    case("stops_by_item_loose", Item, 20, "columns", 1e-2),
    case("stops_by_while", While, 20, "rows", 1e-2),
    case("stops_by_while_never", While, 10, "rows", 1e-12),
    case("stops_by_allclose", AllClose, 12, "columns", 1e-9),
    case("stops_by_all", All, 13, "rows", 1e-2),
    case("stops_by_max", Max, 16, "rows", 1e-8),
    case("stops_by_return", Returns, 20, "rows", 1e-2),
]
