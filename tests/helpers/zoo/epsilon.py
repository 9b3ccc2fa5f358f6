"""Temperatures, where they are kept and where they are applied; terms added to the scores."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, Expected
from .layers import CLASSES, HEAD_DIM, HEADS, TOKENS, WIDTH, Classifier, linear, tokens
from .reference import attend, merge, split


class Attention(nn.Module):
    """Subclasses say what the scores are; the loop is the same for all."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x):
        return (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))  # B H N D

    def loop(self, log_plan):
        for _ in range(4):
            log_plan = log_plan - log_plan.logsumexp(dim=-2, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(dim=-1, keepdim=True)
        return log_plan.exp()

    def bias(self, x):
        return 0.0

    def forward(self, x):
        q, k, v = self.heads(x)
        return (self.loop(self.scores(q, k) + self.bias(x)) @ v).transpose(1, 2).flatten(2)

    def scores(self, q, k):
        return q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) / 0.4


def reference(m, sites, x):
    a = m.attention
    q, k, v = (split(f(x), HEADS) for f in (a.q, a.k, a.v))
    return m.head((x + merge(attend(q, k, v, sites[0], a.bias(x)))).amax(dim=1))


class Buffer(Attention):
    def __init__(self):
        super().__init__()
        self.register_buffer("eps", torch.tensor(0.35))

    def scores(self, q, k):
        return q @ k.mT / math.sqrt(q.size(-1)) / self.eps


class LearnedLog(Attention):
    """One temperature for all heads, kept as its log; this one was trained to 0.5."""

    def __init__(self):
        super().__init__()
        self.log_eps = nn.Parameter(torch.tensor(math.log(0.5)))

    def scores(self, q, k):
        return torch.matmul(q, k.mT).div(HEAD_DIM**0.5 * self.log_eps.exp())


class LearnedSoftplus(Attention):
    """A temperature for each head, kept above a floor."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([0.24, 0.69]).expm1().log())

    def scores(self, q, k):
        eps = 0.01 + F.softplus(self.raw).view(1, -1, 1, 1)
        return q @ k.mT * (HEAD_DIM**-0.5 / eps)


class InverseOfHeads(Attention):
    """Multiplies by an inverse temperature for each head, clamped as in CLIP."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([2.0, 4.0]).log()[:, None, None])

    def scores(self, q, k):
        return self.logit_scale.clamp(max=math.log(100.0)).exp() * (q @ k.transpose(2, 3) * HEAD_DIM**-0.5)


class FoldedIntoQueries(Attention):
    def scores(self, q, k):
        q = q * (HEAD_DIM**-0.5 / 0.3)
        return torch.einsum("bhid,bhjd->bhij", q, k)


class FoldedIntoKeys(Attention):
    def scores(self, q, k):
        return q @ (k / (math.sqrt(HEAD_DIM) * 0.45)).transpose(-2, -1)


class FoldedIntoBoth(Attention):
    """Each side takes the fourth root; the temperature is in the cost's denominator only."""

    def scores(self, q, k):
        q, k = q * HEAD_DIM**-0.25, k * HEAD_DIM**-0.25
        cost = 1.0 - q @ k.transpose(-2, -1)
        return -cost / 0.4


class WithoutRoot(Attention):
    """No division by the root of the head size; epsilon took its part."""

    def scores(self, q, k):
        return q @ k.mT / 1.2


class FromWeights(Attention):
    """The scale is in the weights: not one operation is left of it."""

    def __init__(self):
        super().__init__()
        self.q.weight.data.mul_(HEAD_DIM**-0.5 / 0.4)

    def scores(self, q, k):
        return q @ k.mT


class RelativeBias(Attention):
    """A learned bias for each head and distance, gathered by index."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
        steps = torch.arange(TOKENS)
        self.register_buffer("index", steps[:, None] - steps[None, :] + TOKENS - 1)

    def bias(self, x):
        return self.table[self.index].permute(2, 0, 1).unsqueeze(0)  # 1 H N N


class DistanceSlopes(Attention):
    """Nearer is better, by a fixed slope for each head; symmetric, as encoders have it."""

    def bias(self, x):
        steps = torch.arange(x.shape[1])
        distance = (steps[:, None] - steps[None, :]).abs()
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        return -slopes[:, None, None] * distance


class InputBias(Attention):
    """A bias from every pair of tokens, through a layer of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.pair = linear(WIDTH, 8), linear(WIDTH, 8), linear(8, HEADS)

    def bias(self, x):
        pair = F.relu(self.left(x)[:, :, None] + self.right(x)[:, None])  # B N N 8
        return self.pair(pair).permute(0, 3, 1, 2)


class BiasInsideTemperature(RelativeBias):
    """The bias is added before the division, and in the kernel's exponent only."""

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.mT * HEAD_DIM**-0.5
        K = torch.exp((scores + 0.4 * self.bias(x)) / 0.4)
        for _ in range(4):
            K = K / K.sum(dim=-2, keepdim=True)
            K = K / K.sum(dim=-1, keepdim=True)
        return (K @ v).transpose(1, 2).flatten(2)


class Float32Inside(nn.Module):
    """Scores and loop in float32 whatever the model is in, everything else in the model's own type."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (linear(WIDTH, WIDTH) for _ in range(3))
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        with torch.autocast(x.device.type, enabled=False):
            scores = (q @ k.transpose(-1, -2)).float() / (HEAD_DIM**0.5 * 0.4)
            for _ in range(4):
                scores = scores.log_softmax(dim=-2, dtype=torch.float32).log_softmax(dim=-1, dtype=torch.float32)
            plan = scores.exp()
        return self.head((plan.to(v.dtype) @ v).transpose(1, 2).flatten(2).amax(dim=1))


def float32_reference(m, sites, x):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    return m.head(merge(attend(q, k, v, sites[0])).amax(dim=1))


class ResidualScores(nn.Module):
    """The second layer adds the scores of the first to its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([linear(WIDTH, 3 * WIDTH, 1.4) for _ in range(2)])
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        previous = 0.0
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # B H N D
            previous = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM) + previous
            log_plan = previous
            for _ in range(3):
                log_plan = log_plan.log_softmax(dim=-2)
                log_plan = log_plan.log_softmax(dim=-1)
            x = x + (log_plan.exp() @ v).transpose(1, 2).flatten(2)
            x = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        return self.head(x.amax(dim=1))


def residual_reference(m, sites, x):
    bias = 0.0
    for layer, site in zip(m.layers, sites, strict=True):
        q, k, v = (split(part, HEADS) for part in layer(x).chunk(3, dim=-1))
        x = x + merge(attend(q, k, v, site, bias))
        x = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        bias = q @ k.mT / HEAD_DIM**0.5
    return m.head(x.amax(dim=1))


def case(name, attention, epsilon):
    sites = (Expected(8, "rows", epsilon),)
    return Case(name, lambda: Classifier(attention()), tokens, sites, reference=reference)


CASES = [
    case("buffer", Buffer, 0.35),
    case("learned_log", LearnedLog, 0.5),
    case("learned_softplus", LearnedSoftplus, (0.25, 0.7)),
    case("inverse_of_heads", InverseOfHeads, (0.5, 0.25)),
    case("folded_into_queries", FoldedIntoQueries, 0.3),
    case("folded_into_keys", FoldedIntoKeys, 0.45),
    case("folded_into_both", FoldedIntoBoth, 0.4),
    case("without_root", WithoutRoot, 1.2 / HEAD_DIM**0.5),
    case("from_weights", FromWeights, 1 / HEAD_DIM**0.5),
    case("relative_bias", RelativeBias, 0.4),
    case("distance_slopes", DistanceSlopes, 0.4),
    case("input_bias", InputBias, 0.4),
    case("bias_inside_temperature", BiasInsideTemperature, 0.4),
    Case(
        "residual_scores",
        ResidualScores,
        tokens,
        (Expected(6, "rows", 1.0), Expected(6, "rows", 1.0)),
        reference=residual_reference,
    ),
    Case(
        "float32_inside",
        Float32Inside,
        tokens,
        (Expected(8, "rows", 0.4),),
        reference=float32_reference,
        tolerance=1e-5,
    ),
]
