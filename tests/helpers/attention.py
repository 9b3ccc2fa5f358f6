"""Attention whose plan is made in any coding style, and what is found in it."""

import linecache
import math

import torch
from torch import nn

from asapc.capturing.export import export
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples

WIDTH, HEADS, QUERIES, KEYS = 16, 2, 6, 9
AXIS = {"rows": -1, "columns": -2}


def order(half_steps, last):
    """The axes of the half-steps, in order."""
    other = {"rows": "columns", "columns": "rows"}[last]
    return [last if (half_steps - i) % 2 else other for i in range(half_steps)]


def log_domain(scores, axes):
    log_plan = scores
    for axis in axes:
        log_plan = log_plan - torch.logsumexp(log_plan, dim=AXIS[axis], keepdim=True)
    return log_plan.exp()


def log_softmax(scores, axes):
    for axis in axes:
        scores = scores.log_softmax(dim=AXIS[axis])
    return scores.exp()


def division(scores, axes):
    plan = torch.exp(scores - scores.amax(dim=(-1, -2), keepdim=True))
    for axis in axes:
        plan = plan / plan.sum(dim=AXIS[axis], keepdim=True)
    return plan


def division_in_place(scores, axes):
    plan = scores.exp_()
    for axis in axes:
        plan /= plan.sum(dim=AXIS[axis], keepdim=True)
    return plan


def scaling_vectors(scores, axes):
    kernel = scores.exp()
    u, v = torch.ones_like(scores[..., :1]), torch.ones_like(scores[..., :1, :])
    for axis in axes:
        if axis == "rows":
            u = 1 / (kernel * v).sum(dim=-1, keepdim=True)
        else:
            v = 1 / (kernel * u).sum(dim=-2, keepdim=True)
    return u * kernel * v


def potentials(scores, axes):
    """Sinkformers' way: costs, potentials updated by what is missing, uniform marginals, then times n."""
    n, m = scores.shape[-2:]
    cost = -scores
    u, v = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
    for axis in axes:
        log_plan = -cost + u.unsqueeze(-1) + v.unsqueeze(-2)
        if axis == "rows":
            u = math.log(1 / n) - torch.logsumexp(log_plan, dim=-1) + u
        else:
            v = math.log(1 / m) - torch.logsumexp(log_plan, dim=-2) + v
    return n * torch.exp(-cost + u.unsqueeze(-1) + v.unsqueeze(-2))


STYLES = [log_domain, log_softmax, division, division_in_place, scaling_vectors, potentials]


class Attention(nn.Module):
    """Attention whose plan is `normalise(scores / epsilon)`; of x to itself, or of x to a context."""

    def __init__(self, normalise, epsilon=0.5, returns_plan=False):
        super().__init__()
        self.normalise, self.epsilon, self.returns_plan = normalise, epsilon, returns_plan
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x):
        return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

    def scaled(self, scores):
        return scores / math.sqrt(WIDTH // HEADS) / self.epsilon

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(context)), self.heads(self.to_v(context))
        plan = self.normalise(self.scaled(q @ k.transpose(-1, -2)))
        output = (plan @ v).transpose(1, 2).flatten(2)
        return (output, plan) if self.returns_plan else output


def find(module, **inputs):
    samples = Samples(inputs or {"x": torch.randn(3, QUERIES, WIDTH)})
    return find_sinkhorn(CapturedGraph(export(module.eval(), samples[:2].inputs), samples[:2]), samples)


def sinkhorn(style, half_steps, last):
    return lambda scores: style(scores, order(half_steps, last))


def softmax(scores):
    return scores.softmax(dim=-1)


def source_text(finding):
    """The line of code that a site or a miss points to."""
    file, line = finding.source.rsplit(":", 1)
    return linecache.getline(file, int(line))
