"""Sinkhorn from its definition, for the zoo to be checked against. Shares no code with asapc."""

import math

import torch

DIM = {"rows": -1, "columns": -2}


def sinkhorn(scores, site, live=None, mu=None, nu=None):
    """Plan (..., N, M) after the half-steps of `site`, from zero.

    Every half-step makes the sums of its axis 1, or mu (..., N) and nu (..., M). Entries that are not live are zero,
    and so are rows and columns without a live entry.
    """
    marginals = {"rows": mu, "columns": nu}
    log_plan = scores if live is None else scores.masked_fill(~live, -math.inf)
    other = {"rows": "columns", "columns": "rows"}[site.last]
    for left in reversed(range(site.half_steps)):
        axis = other if left % 2 else site.last
        total = torch.logsumexp(log_plan, dim=DIM[axis], keepdim=True)
        log_plan = log_plan - torch.where(total.isinf(), 0.0, total)
        if marginals[axis] is not None:
            log_plan = log_plan + marginals[axis].log().unsqueeze(DIM[axis])
    return log_plan.exp()


def attend(q, k, v, site, bias=0.0, live=None):
    """Sinkhorn attention of q (..., N, D) to k (..., M, D); an epsilon per head counts along axis -3."""
    epsilon = torch.as_tensor(site.epsilon)
    epsilon = epsilon.view(-1, 1, 1) if epsilon.dim() else epsilon
    return sinkhorn(q @ k.mT / (q.shape[-1] ** 0.5 * epsilon) + bias, site, live) @ v


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # B H N D


def merge(x):
    return x.transpose(1, 2).flatten(2)  # B N C


def classifier(model, sites, x, factor=1.0):
    """Reference of `layers.Classifier` around a `layers.Attention`; `factor` is on the plan."""
    attention, [site] = model.attention, sites
    q, k, v = (split(layer(x), 2) for layer in (attention.q, attention.k, attention.v))
    return model.head((x + attention.out(factor * merge(attend(q, k, v, site)))).amax(dim=1))
