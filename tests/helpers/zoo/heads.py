"""Heads wherever they may stand."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, Expected
from .layers import CLASSES, HEADS, WIDTH, linear, tokens
from .reference import attend, merge, split


class FusedBNHM(nn.Module):
    """One layer for q, k and v, einsum, the heads between queries and keys."""

    def __init__(self):
        super().__init__()
        self.to_qkv = linear(WIDTH, 3 * WIDTH, gain=1.5)
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.to_qkv(x).reshape(b, n, 3, 4, c // 4).unbind(dim=2)  # B N H D
        attn = torch.einsum("bihd,bjhd->bihj", q, k) * (c // 4) ** -0.5  # B N H M
        for _ in range(3):
            attn = attn - attn.logsumexp(dim=3, keepdim=True)
            attn = attn - attn.logsumexp(dim=1, keepdim=True)
        out = torch.einsum("bihj,bjhd->bihd", attn.exp(), v).flatten(2)
        return self.head(out.amax(dim=1))


def fused_reference(m, sites, x):
    q, k, v = (split(part, 4) for part in m.to_qkv(x).chunk(3, dim=-1))
    return m.head(merge(attend(q, k, v, sites[0])).amax(dim=1))


class FusedBNMH(nn.Module):
    """The heads come last, as with pair representations."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(WIDTH, WIDTH, 2.0), linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v))  # B N H D
        logits = torch.einsum("bnhd,bmhd->bnmh", q, k) / math.sqrt(q.shape[-1])  # B N M H
        plan = torch.exp(logits)
        for _ in range(4):
            plan = plan / plan.sum(dim=1, keepdim=True)
            plan = plan / plan.sum(dim=2, keepdim=True)
        return self.head(torch.einsum("bnmh,bmhd->bnhd", plan, v).flatten(2).amax(dim=1))


def separate_reference(m, sites, x):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    return m.head(merge(attend(q, k, v, sites[0])).amax(dim=1))


class BatchMajor(FusedBNMH):
    """Heads merged into the batch; baddbmm takes the scale along."""

    def merged(self, x):
        b, n, _ = x.shape
        return x.view(b, n, HEADS, -1).permute(0, 2, 1, 3).reshape(b * HEADS, n, -1)  # BH N D

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.merged(self.q(x)), self.merged(self.k(x)), self.merged(self.v(x))
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), alpha=(c // HEADS) ** -0.5)  # BH N N
        for i in range(9):
            scores = torch.log_softmax(scores, dim=1 + (i + 1) % 2)
        y = torch.bmm(scores.exp(), v).view(b, HEADS, n, -1)
        return self.head(y.permute(0, 2, 1, 3).reshape(b, n, c).amax(dim=1))


class HeadMajor(FusedBNMH):
    """Heads merged into the batch by split and cat: all samples of the first head, then all of the second."""

    def forward(self, x):
        Q, K, V = self.q(x), self.k(x), self.v(x)
        d = Q.size(2) // HEADS
        Q_, K_, V_ = (torch.cat(T.split(d, 2), 0) for T in (Q, K, V))  # HB N D
        A = Q_.bmm(K_.transpose(1, 2)) / math.sqrt(d)
        f, g = torch.zeros_like(A[:, :, 0]), torch.zeros_like(A[:, 0, :])
        for _ in range(3):
            f = f - torch.logsumexp(A + f[:, :, None] + g[:, None, :], dim=2)
            g = g - torch.logsumexp(A + f[:, :, None] + g[:, None, :], dim=1)
        A = torch.exp(A + f[:, :, None] + g[:, None, :])
        O = torch.cat(A.bmm(V_).split([Q.size(0)] * HEADS, 0), 2)  # B N C  # noqa: E741
        return self.head(O.max(dim=1)[0])


class HeadsBeforeBatch(FusedBNMH):
    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], HEADS, -1).permute(2, 0, 1, 3) for f in (self.q, self.k, self.v))  # H B N D
        plan = F.softmax(q @ k.mT * q.size(-1) ** -0.5, dim=-2)  # H B N N
        for _ in range(3):
            plan = plan / plan.sum(-1, keepdim=True)
            plan = plan / plan.sum(-2, keepdim=True)
        return self.head((plan @ v).permute(1, 2, 0, 3).flatten(2).amax(1))


class SingleHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = linear(WIDTH, 8, 1.8), linear(WIDTH, 8, 1.8), linear(WIDTH, 12)
        self.head = linear(12, CLASSES)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        log_plan = torch.matmul(q, k.transpose(1, 2)) / 8**0.5  # B N N
        for _ in range(5):
            log_plan = F.log_softmax(log_plan, dim=1)
            log_plan = F.log_softmax(log_plan, dim=2)
        return self.head((log_plan.exp() @ v).amax(dim=1))


def single_head_reference(m, sites, x):
    return m.head(attend(m.query(x), m.key(x), m.value(x), sites[0]).amax(dim=1))


class HeadList(nn.Module):
    """A module for each head, joined afterwards: each is a site of its own."""

    class Head(nn.Module):
        def __init__(self, iterations):
            super().__init__()
            self.q, self.k, self.v = linear(WIDTH, 8, 2.0), linear(WIDTH, 8), linear(WIDTH, 8)
            self.iterations = iterations

        def forward(self, x):
            wei = self.q(x) @ self.k(x).transpose(-2, -1) * 8**-0.5  # B N N
            for _ in range(self.iterations):
                wei = wei.log_softmax(dim=-2).log_softmax(dim=-1)
            return wei.exp() @ self.v(x)

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([self.Head(iterations) for iterations in (2, 5)])
        self.head = linear(16, CLASSES)

    def forward(self, x):
        return self.head(torch.cat([h(x) for h in self.heads], dim=-1).amax(dim=1))


def head_list_reference(m, sites, x):
    outs = [attend(h.q(x), h.k(x), h.v(x), site) for h, site in zip(m.heads, sites, strict=True)]
    return m.head(torch.cat(outs, dim=-1).amax(dim=1))


class MultiQuery(nn.Module):
    """Four heads of queries, one of keys and values."""

    def __init__(self, groups=1, heads=4):
        super().__init__()
        self.heads, self.groups = heads, groups
        self.wq, self.wk, self.wv = linear(WIDTH, 32, 2.2), linear(WIDTH, groups * 8), linear(WIDTH, groups * 8)
        self.head = linear(32, CLASSES)

    def spread(self, x):
        b, n, _ = x.shape
        return x.unsqueeze(1).expand(b, self.heads, n, 8)

    def forward(self, x):
        q = self.wq(x).unflatten(2, (self.heads, 8)).transpose(1, 2)  # B H N D
        k, v = self.spread(self.wk(x)), self.spread(self.wv(x))
        p = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(dim=-1)
        for _ in range(4):
            p = p / p.sum(dim=-2, keepdim=True)
            p = p / p.sum(dim=-1, keepdim=True)
        return self.head((p @ v).transpose(1, 2).flatten(2).amax(dim=1))


class MultiQueryByEquations(MultiQuery):
    """Keys and values without a head axis; the result comes out as tokens, heads, channels, and is viewed as one."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.wq(x).view(b, n, self.heads, 8), self.wk(x), self.wv(x)
        log_p = torch.einsum("bihd,bjd->bhij", q, k) / math.sqrt(8)
        for _ in range(4):
            log_p = log_p.log_softmax(dim=-2).log_softmax(dim=-1)
        return self.head(torch.einsum("bhij,bjd->bihd", log_p.exp(), v).reshape(b, n, 32).amax(dim=1))


class GroupedRepeat(MultiQuery):
    """Two heads of keys and values, each repeated for two of queries."""

    def spread(self, x):
        return x.unflatten(2, (self.groups, 8)).transpose(1, 2).repeat_interleave(self.heads // self.groups, dim=1)


class GroupedFiveAxes(MultiQuery):
    """The same by a product of five axes that broadcasts."""

    def forward(self, x):
        b, n, _ = x.shape
        q = self.wq(x).view(b, n, self.groups, -1, 8).permute(0, 2, 3, 1, 4)  # B G R N D
        k = self.wk(x).view(b, n, self.groups, 1, 8).permute(0, 2, 3, 1, 4)  # B G 1 N D
        v = self.wv(x).view(b, n, self.groups, 1, 8).permute(0, 2, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(-1, -2)) * 8**-0.5  # B G R N N
        for _ in range(3):
            scores = scores - scores.logsumexp(-2, keepdim=True)
            scores = scores - scores.logsumexp(-1, keepdim=True)
        return self.head((scores.exp() @ v).permute(0, 3, 1, 2, 4).reshape(b, n, 32).amax(dim=1))


def grouped_reference(m, sites, x):
    q, k, v = split(m.wq(x), m.heads), split(m.wk(x), m.groups), split(m.wv(x), m.groups)
    k, v = (t[:, [h * m.groups // m.heads for h in range(m.heads)]] for t in (k, v))
    return m.head(merge(attend(q, k, v, sites[0])).amax(dim=1))


class Rotary(FusedBNMH):
    def rotate(self, x):
        d = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] / 10.0 ** (torch.arange(d) / d)  # N D/2
        a, b = x[..., :d], x[..., d:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q), self.rotate(k)
        K = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
        r = torch.ones_like(K[..., :1])
        for _ in range(6):
            c = 1 / (K.transpose(-1, -2) @ r)
            r = 1 / (K @ c)
        y = r * K * c.transpose(-1, -2) @ v
        return self.head(y.transpose(1, 2).flatten(2).amax(dim=1))


def rotary_reference(m, sites, x):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    return m.head(merge(attend(m.rotate(q), m.rotate(k), v, sites[0])).amax(dim=1))


class NormalisedQK(FusedBNMH):
    """Cosines over a temperature."""

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        log_plan = torch.einsum("bhid,bhjd->bhij", q, k) / 0.15
        for _ in range(4):
            log_plan = log_plan - torch.logsumexp(log_plan, -1, keepdim=True)
            log_plan = log_plan - torch.logsumexp(log_plan, -2, keepdim=True)
        y = torch.einsum("bhij,bhjd->bihd", log_plan.exp(), v)
        return self.head(y.flatten(2).amax(dim=1))


def normalised_qk_reference(m, sites, x):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    return m.head(merge(attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, sites[0])).amax(dim=1))


def case(name, build, reference, half_steps, last, epsilon=1.0, inputs=tokens, tolerance=1e-9):
    sites = (Expected(half_steps, last, epsilon),)
    return Case(name, build, inputs, sites, reference=reference, tolerance=tolerance)


CASES = [
    case("heads_inside", FusedBNHM, fused_reference, 6, "columns"),
    case("heads_last", FusedBNMH, separate_reference, 8, "rows"),
    case("heads_batch_major", BatchMajor, separate_reference, 9, "rows"),
    case("heads_head_major", HeadMajor, separate_reference, 6, "columns"),
    case("heads_before_batch", HeadsBeforeBatch, separate_reference, 7, "columns"),
    case("single_head", SingleHead, single_head_reference, 10, "rows"),
    Case(
        "head_list",
        HeadList,
        tokens,
        (Expected(4, "rows", 1.0), Expected(10, "rows", 1.0)),
        reference=head_list_reference,
    ),
    case("multi_query", MultiQuery, grouped_reference, 9, "rows"),
    case("multi_query_by_equations", MultiQueryByEquations, grouped_reference, 8, "rows"),
    case("grouped_repeat", lambda: GroupedRepeat(groups=2), grouped_reference, 9, "rows"),
    case("grouped_five_axes", lambda: GroupedFiveAxes(groups=2), grouped_reference, 6, "rows"),
    case("rotary", Rotary, rotary_reference, 12, "rows"),
    case("normalised_qk", NormalisedQK, normalised_qk_reference, 8, "columns", 0.15 / 8**0.5),
]
