"""Padding, and what people do about it. `mask` is true at tokens, false at padding, and differs by sample."""

import functools
import math

import torch
from torch import nn

from .case import Case, Expected
from .layers import CLASSES, HEADS, TOKENS, WIDTH, linear
from .reference import attend, merge, split


class Masked(nn.Module):
    def __init__(self, half_steps, prefix=0):
        super().__init__()
        self.half_steps = half_steps
        self.q, self.k, self.v = linear(WIDTH, WIDTH, 2.3), linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.prefix = nn.Parameter(torch.randn(prefix, WIDTH))
        self.head = linear(WIDTH, CLASSES)

    def heads(self, x):
        return (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))  # B H N D

    def forward(self, x, mask):
        q, k, v = self.heads(x)
        plan = self.plan(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), mask)
        y = (plan @ v).transpose(1, 2).flatten(2)
        return self.head(y.masked_fill(~mask[..., None], -math.inf).amax(dim=1))


def padded(batch, generator):
    lengths = torch.randint(TOKENS // 3, TOKENS + 1, (batch, 1), generator=generator)
    return {
        "x": torch.randn(batch, TOKENS, WIDTH, generator=generator),
        "mask": torch.arange(TOKENS) < lengths,
    }


def reference(m, sites, x, mask, two_sided=False):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    live = mask[:, None, None, :]
    if two_sided:
        live = live & mask[:, None, :, None]
    y = merge(attend(q, k, v, sites[0], live=live))
    return m.head(y.masked_fill(~mask[..., None], -math.inf).amax(dim=1))


class KeysMinusInfinity(Masked):
    """The sum of a padded column is -inf; taken as 0 it leaves the column alone."""

    def plan(self, scores, mask):
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        for i in range(self.half_steps):
            total = torch.logsumexp(scores, dim=-1 - (i + 1) % 2, keepdim=True)
            scores = scores - total.masked_fill(total == float("-inf"), 0.0)
        return scores.exp()


class KeysRemasked(Masked):
    """A half-step on columns would bring padded columns back to life, so they are filled again after it."""

    def plan(self, scores, mask):
        padding = mask.logical_not()[:, None, None, :]
        scores = scores.masked_fill(padding, -1e9)
        for _ in range(self.half_steps // 2):
            scores = scores.log_softmax(dim=-2).masked_fill(padding, -1e9)
            scores = scores.log_softmax(dim=-1)
        return scores.exp()


class KeysReset(Masked):
    """Potentials; those of padded keys shoot up to 1e9, and are set back in place."""

    def plan(self, scores, mask):
        n = scores.shape[-1]
        cost = (-scores).masked_fill(~mask[:, None, None, :], 1e9)
        u, v = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
        for i in range(self.half_steps):
            M = -cost + u.unsqueeze(-1) + v.unsqueeze(-2)
            if i % 2 == 0:
                u = -math.log(n) - M.logsumexp(-1) + u
            else:
                v = -math.log(n) - M.logsumexp(-2) + v
                v[v > 9e8] = 0.0
        return n * torch.exp(-cost + u.unsqueeze(-1) + v.unsqueeze(-2))


class KernelTimesMask(Masked):
    """Zeros and ones on the kernel, scaling vectors, sums held above 1e-9."""

    def plan(self, scores, mask):
        K = torch.exp(scores) * mask[:, None, None, :].to(scores.dtype)
        c = mask[:, None, None, :].to(scores.dtype)
        for _ in range(self.half_steps // 2):
            r = 1 / (K * c).sum(-1, keepdim=True).clamp(min=1e-9)
            c = 1 / (K * r).sum(-2, keepdim=True).clamp(min=1e-9)
        return r * K * c


class KernelTimesMaskOnValues(Masked):
    """Zeros and ones on the kernel; the vectors scale the values and the result, and no plan is built."""

    def forward(self, x, mask):
        q, k, v = self.heads(x)
        K = torch.exp(q @ k.mT / math.sqrt(q.shape[-1])) * mask[:, None, None, :].to(q.dtype)
        r = torch.ones_like(K[..., :1])
        for _ in range(self.half_steps // 2):
            c = 1 / (K.mT @ r).clamp(min=1e-9)
            r = 1 / (K @ c).clamp(min=1e-9)
        y = (r * (K @ (c * v))).transpose(1, 2).flatten(2)
        return self.head(y.masked_fill(~mask[..., None], -math.inf).amax(dim=1))


class PlanTimesMask(Masked):
    """The mask is multiplied in at every turn, and 1e-8 added to every sum."""

    def plan(self, scores, mask):
        m = mask.float().to(scores)[:, None, None]  # B 1 1 M
        plan = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        for _ in range(self.half_steps // 2):
            plan = plan * m
            plan = plan / (plan.sum(dim=-1, keepdim=True) + 1e-8)
            plan = plan * m
            plan = plan / (plan.sum(dim=-2, keepdim=True) + 1e-8)
        return plan


class BothSidesWhere(Masked):
    """A matrix of pairs; wholly masked rows and columns are divided by one."""

    def plan(self, scores, mask):
        pair = mask[:, None, :, None] & mask[:, None, None, :]
        plan = torch.where(pair, scores.exp(), torch.zeros_like(scores))
        for i in range(self.half_steps):
            total = plan.sum(dim=-2 + i % 2, keepdim=True)
            plan = plan / torch.where(total > 0, total, 1.0)
        return plan


class BothSidesNanToNum(Masked):
    """-inf everywhere, and whatever becomes nan is -inf again."""

    def plan(self, scores, mask):
        pair = torch.einsum("bi,bj->bij", mask.to(scores), mask.to(scores)).bool().unsqueeze(1)
        scores = scores.masked_fill(~pair, -math.inf)
        for _ in range(self.half_steps // 2):
            scores = torch.log_softmax(scores, dim=-1).nan_to_num(nan=-math.inf, neginf=-math.inf)
            scores = torch.log_softmax(scores, dim=-2).nan_to_num(nan=-math.inf, neginf=-math.inf)
        return scores.exp()


class BothSidesMinusBillion(Masked):
    """The pair mask is added in float at every step; padded queries look anywhere, and are zeroed in the end."""

    def plan(self, scores, mask):
        pair = (mask[:, :, None] & mask[:, None, :]).unsqueeze(1)
        bias = torch.zeros_like(scores).masked_fill_(~pair, -1e9)
        log_plan = scores
        for _ in range(self.half_steps // 2):
            log_plan = (log_plan + bias).log_softmax(-1)
            log_plan = (log_plan + bias).log_softmax(-2)
        return log_plan.exp() * pair


class MassOfTokens(Masked):
    """No mask on the scores at all: padding has no mass."""

    def plan(self, scores, mask):
        K = scores.exp()
        length = mask.sum(dim=-1)[:, None, None, None]
        mass = mask[:, None, :, None] / length  # B 1 N 1
        v = mass
        for _ in range(self.half_steps // 2):
            u = mass / (K @ v)
            v = mass / (K.transpose(-1, -2) @ u)
        return length * (u * K * v.transpose(-1, -2))


class Additive(Masked):
    """The caller sends the mask as scores to add: 0 and -10000."""

    def forward(self, x, bias):
        q, k, v = self.heads(x)
        bias = bias[:, None, None, :]
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
        for _ in range(self.half_steps // 2):
            scores = scores - scores.logsumexp(-2, keepdim=True) + bias
            scores = scores - scores.logsumexp(-1, keepdim=True)
        return self.head((scores.exp() @ v).transpose(1, 2).flatten(2).amax(dim=1))


def additive(batch, generator):
    inputs = padded(batch, generator)
    return {"x": inputs["x"], "bias": torch.zeros(batch, TOKENS).masked_fill(~inputs["mask"], -1e4)}


def additive_reference(m, sites, x, bias):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    return m.head(merge(attend(q, k, v, sites[0], live=(bias == 0)[:, None, None, :])).amax(dim=1))


class Lengths(Masked):
    """The caller sends lengths; one head, no head axis."""

    def forward(self, x, lengths):
        q, k, v = self.q(x), self.k(x), self.v(x)
        mask = torch.arange(x.size(1), device=x.device)[None, :] < lengths[:, None]
        scores = torch.bmm(q, k.transpose(1, 2)) / WIDTH**0.5
        attn = torch.softmax(scores.masked_fill(~mask[:, None, :], -torch.inf), dim=-1)
        for _ in range(self.half_steps // 2):
            attn = attn / attn.sum(dim=1, keepdim=True).clamp_min(1e-12)
            attn = attn / attn.sum(dim=2, keepdim=True)
        return self.head(torch.bmm(attn, v).amax(dim=1))


def lengths(batch, generator):
    inputs = padded(batch, generator)
    return {"x": inputs["x"], "lengths": inputs["mask"].sum(dim=1)}


def lengths_reference(m, sites, x, lengths):
    live = (torch.arange(x.shape[1]) < lengths[:, None])[:, None, :]
    return m.head(attend(m.q(x), m.k(x), m.v(x), sites[0], live=live).amax(dim=1))


class ClassAndRegisters(Masked):
    """A class token and two registers stand before the tokens, and are never padding; the class token is read."""

    def forward(self, x, mask):
        b = x.shape[0]
        x = torch.cat([self.prefix.expand(b, -1, -1), x], dim=1)  # B 3+N C
        mask = torch.cat([mask.new_ones(b, len(self.prefix)), mask], dim=1)
        q, k, v = self.heads(x)
        K = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
        K = K.masked_fill(~mask[:, None, None, :], 0.0).masked_fill(~mask[:, None, :, None], 0.0)
        for _ in range(self.half_steps // 2):
            K = (K / K.sum(-2, keepdim=True)).nan_to_num(0.0)
            K = (K / K.sum(-1, keepdim=True)).nan_to_num(0.0)
        return self.head((K @ v).transpose(1, 2).flatten(2)[:, 0])


def class_reference(m, sites, x, mask):
    x = torch.cat([m.prefix.expand(len(x), -1, -1), x], dim=1)
    mask = torch.cat([torch.ones(len(x), 3, dtype=torch.bool), mask], dim=1)
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    live = mask[:, None, :, None] & mask[:, None, None, :]
    return m.head(merge(attend(q, k, v, sites[0], live=live))[:, 0])


class CrossBothPadded(Masked):
    """Queries and keys of different numbers, each with padding of its own."""

    def forward(self, x, context, mask, context_mask):
        q, _, _ = self.heads(x)
        _, k, v = self.heads(context)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.size(-1) ** -0.5
        row, column = mask[:, None, :, None], context_mask[:, None, None, :]
        scores = scores.masked_fill(~(row & column), -1e30)
        f, g = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[..., :1, :])
        for _ in range(self.half_steps // 2):
            g = torch.where(column, -torch.logsumexp(scores + f, dim=-2, keepdim=True), 0.0)
            f = torch.where(row, -torch.logsumexp(scores + g, dim=-1, keepdim=True), 0.0)
        y = torch.exp(scores + f + g) @ v
        return self.head(y.transpose(1, 2).flatten(2).sum(dim=1) / mask.sum(dim=1, keepdim=True))


def both_padded(batch, generator):
    x = padded(batch, generator)
    lengths = torch.randint(5, 12, (batch, 1), generator=generator)
    context = torch.randn(batch, 11, WIDTH, generator=generator)
    return {"x": x["x"], "context": context, "mask": x["mask"], "context_mask": torch.arange(11) < lengths}


def cross_reference(m, sites, x, context, mask, context_mask):
    q, k, v = split(m.q(x), HEADS), split(m.k(context), HEADS), split(m.v(context), HEADS)
    y = attend(q, k, v, sites[0], live=mask[:, None, :, None] & context_mask[:, None, None, :])
    return m.head(merge(y).sum(dim=1) / mask.sum(dim=1, keepdim=True))


class SinkAfterSoftmaxHeadsLast(Masked):
    """Heads in the last axis; a masked softmax over keys, then columns and rows by turns."""

    def forward(self, x, mask):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v))  # B N H D
        sim = torch.einsum("bihd,bjhd->bijh", q, k) / math.sqrt(q.shape[-1])
        sim = sim.masked_fill(~mask[:, None, :, None], torch.finfo(sim.dtype).min)
        p = sim.softmax(dim=2)
        for _ in range(self.half_steps // 2):
            p = p / (p.sum(dim=1, keepdim=True) + (~mask)[:, None, :, None])  # 0 / 1 at padding
            p = p / p.sum(dim=2, keepdim=True)
        y = torch.einsum("bijh,bjhd->bihd", p, v).flatten(2)
        return self.head(y.masked_fill(~mask[..., None], -math.inf).amax(dim=1))


class WholeSamples(BothSidesNanToNum):
    """Some samples are padding altogether: their plan is zero, and so is its product with the values."""

    def forward(self, x, mask):
        q, k, v = self.heads(x)
        plan = self.plan(q @ k.mT / math.sqrt(q.shape[-1]), mask)
        return self.head((plan @ v).transpose(1, 2).flatten(2).amax(dim=1))


def whole_samples(batch, generator):
    inputs = padded(batch, generator)
    inputs["mask"][1::3] = False
    return inputs


def whole_samples_reference(m, sites, x, mask):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    live = mask[:, None, :, None] & mask[:, None, None, :]
    return m.head(merge(attend(q, k, v, sites[0], live=live)).amax(dim=1))


class AttentionMask(Masked):
    """The mask is of integers, 1 at tokens, as tokenisers give it, and becomes the lowest float there is."""

    def forward(self, x, attention_mask):
        q, k, v = self.heads(x)
        lowest = torch.finfo(x.dtype).min
        bias = (1 - attention_mask[:, None, None, :].to(x.dtype)) * lowest
        scores = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).log_softmax(dim=-1)
        for _ in range(self.half_steps // 2):
            scores = scores.log_softmax(dim=-2).masked_fill(attention_mask[:, None, None, :] == 0, lowest)
            scores = scores.log_softmax(dim=-1)
        y = (scores.exp() @ v).transpose(1, 2).flatten(2)
        return self.head((y * attention_mask[..., None]).sum(dim=1))


def attention_mask(batch, generator):
    inputs = padded(batch, generator)
    return {"x": inputs["x"], "attention_mask": inputs["mask"].long()}


def attention_mask_reference(m, sites, x, attention_mask):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    y = merge(attend(q, k, v, sites[0], live=attention_mask.bool()[:, None, None, :]))
    return m.head((y * attention_mask[..., None]).sum(dim=1))


class TokenIds(Masked):
    """There is no mask among the inputs: an id of 0 is padding."""

    def __init__(self, half_steps):
        super().__init__(half_steps)
        self.embedding = nn.Embedding(20, WIDTH)

    def forward(self, ids):
        return super().forward(self.embedding(ids), ids.ne(0))

    def plan(self, scores, mask):
        K = scores.exp() * mask[:, None, None, :]
        for _ in range(self.half_steps // 2):
            K = K / K.sum(-1, keepdim=True)
            K = K / (K.sum(-2, keepdim=True) + 1e-12)
        return K


def token_ids(batch, generator):
    mask = padded(batch, generator)["mask"]
    return {"ids": torch.randint(1, 20, mask.shape, generator=generator) * mask}


def token_ids_reference(m, sites, ids):
    return reference(m, sites, m.embedding(ids), ids > 0)


def case(name, build, half_steps, last, inputs=padded, reference=reference, epsilon=1.0, tolerance=1e-9, **options):
    sites = (Expected(half_steps, last, epsilon, masked=True),)
    build = functools.partial(build, half_steps, **options)
    return Case(name, build, inputs, sites, reference=reference, tolerance=tolerance)


both_sides = functools.partial(reference, two_sided=True)

CASES = [
    case("keys_minus_infinity", KeysMinusInfinity, 7, "columns"),
    case("keys_remasked", KeysRemasked, 8, "rows"),
    case("keys_reset", KeysReset, 3, "rows"),
    case("kernel_times_mask", KernelTimesMask, 10, "columns"),
    case("kernel_times_mask_on_values", KernelTimesMaskOnValues, 10, "rows"),
    case("plan_times_mask", PlanTimesMask, 6, "columns", tolerance=1e-5),
    case("both_sides_where", BothSidesWhere, 9, "columns", reference=both_sides),
    case("both_sides_nan_to_num", BothSidesNanToNum, 8, "columns", reference=both_sides),
    case("both_sides_minus_billion", BothSidesMinusBillion, 6, "columns", reference=both_sides),
    case("mass_of_tokens", MassOfTokens, 12, "columns", reference=both_sides),
    case("additive", Additive, 10, "rows", additive, additive_reference),
    case("lengths", Lengths, 5, "rows", lengths, lengths_reference),
    case("class_and_registers", ClassAndRegisters, 8, "rows", reference=class_reference, prefix=3),
    case("cross_both_padded", CrossBothPadded, 6, "rows", both_padded, cross_reference),
    case("softmax_heads_last", SinkAfterSoftmaxHeadsLast, 7, "rows"),
    case("whole_samples", WholeSamples, 6, "columns", whole_samples, whole_samples_reference),
    case("attention_mask", AttentionMask, 9, "rows", attention_mask, attention_mask_reference),
    case("token_ids", TokenIds, 8, "columns", token_ids, token_ids_reference, tolerance=1e-7),
]
