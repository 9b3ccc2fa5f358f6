"""Queries and keys from wherever they may come, one site or several."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, Expected
from .heads import FusedBNMH, case, separate_reference
from .layers import CLASSES, HEADS, TOKENS, WIDTH, linear, tokens
from .reference import attend, merge, sinkhorn, split


class Cross(nn.Module):
    """From x to a longer context; ends on columns, whose sums are N/M."""

    def __init__(self):
        super().__init__()
        self.norm_q, self.norm_c = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.kv = linear(WIDTH, WIDTH, 2.5), linear(WIDTH, 2 * WIDTH)
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x, context):
        q = self.q(self.norm_q(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # B H N D
        k, v = self.kv(self.norm_c(context)).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)  # B H M D
        log_plan = q @ k.transpose(-1, -2) / 8**0.5
        for _ in range(4):
            log_plan = log_plan.log_softmax(dim=-1)
            log_plan = log_plan.log_softmax(dim=-2) + math.log(x.shape[1] / context.shape[1])
        return self.head((log_plan.exp() @ v).transpose(1, 2).flatten(2).amax(dim=1))


def cross_reference(m, sites, x, context):
    q = split(m.q(m.norm_q(x)), HEADS)
    k, v = (split(part, HEADS) for part in m.kv(m.norm_c(context)).chunk(2, dim=-1))
    return m.head(merge(attend(q, k, v, sites[0]) * x.shape[1] / context.shape[1]).amax(dim=1))


class CrossOnValues(Cross):
    """The same from vectors that never meet in a plan; everything by einsum, the heads between queries and keys."""

    def forward(self, x, context):
        q = self.q(self.norm_q(x)).unflatten(-1, (HEADS, -1))  # B N H D
        k, v = self.kv(self.norm_c(context)).unflatten(-1, (2, HEADS, -1)).unbind(2)  # B M H D
        kernel = torch.einsum("bnhd,bmhd->bnhm", q, k).div(8**0.5).exp()
        right = torch.ones_like(k[..., 0])  # B M H
        for _ in range(4):
            left = 1 / torch.einsum("bnhm,bmh->bnh", kernel, right)
            right = (x.shape[1] / context.shape[1]) / torch.einsum("bnhm,bnh->bmh", kernel, left)
        y = torch.einsum("bnhm,bmhd->bnhd", kernel, right.unsqueeze(-1) * v) * left.unsqueeze(-1)
        return self.head(y.flatten(2).amax(dim=1))


class LearnedLatents(nn.Module):
    """Eight learned queries read sixteen tokens."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(1.6 * torch.randn(8, WIDTH))
        self.k, self.v = linear(WIDTH, WIDTH, 1.4), linear(WIDTH, WIDTH)
        self.head = linear(8 * WIDTH, CLASSES)

    def forward(self, x):
        q = self.latents.expand(x.size(0), -1, -1)  # B L C
        attn = torch.bmm(q, self.k(x).transpose(1, 2)) / WIDTH**0.5  # B L N
        attn = attn.exp()
        for _ in range(5):
            attn = attn / attn.sum(dim=1, keepdim=True)
            attn = attn / attn.sum(dim=2, keepdim=True)
        return self.head(torch.bmm(attn, self.v(x)).flatten(1))


def latents_reference(m, sites, x):
    return m.head(attend(m.latents.expand(len(x), -1, -1), m.k(x), m.v(x), sites[0]).flatten(1))


class Slots(nn.Module):
    """Slot attention: softmax over the slots, then each slot's weights made to sum to one. The plan lies transposed."""

    def __init__(self):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(6, WIDTH))
        self.q, self.k, self.v = linear(WIDTH, WIDTH, 2.0), linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        q = self.q(self.slots).expand(x.shape[0], -1, -1)  # B S C
        dots = torch.einsum("bnc,bsc->bns", self.k(x), q) * WIDTH**-0.5
        attn = dots.softmax(dim=-1)  # B N S
        attn = attn / attn.sum(dim=1, keepdim=True)
        updates = torch.einsum("bns,bnc->bsc", attn, self.v(x))
        return self.head((self.slots + updates).amax(dim=1))


def slots_reference(m, sites, x):
    q = m.q(m.slots).expand(len(x), -1, -1)
    return m.head((m.slots + attend(q, m.k(x), m.v(x), sites[0])).amax(dim=1))


class ValuesFirst(nn.Module):
    """Channels first, and values @ attention: queries are what the last axis of the plan stands for."""

    def __init__(self):
        super().__init__()
        self.k_conv = nn.Conv1d(WIDTH, 8, 1, bias=False)
        self.q_conv = nn.Conv1d(WIDTH, 8, 1, bias=False)
        self.v_conv = nn.Conv1d(WIDTH, WIDTH, 1, bias=False)
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            nn.init.normal_(conv.weight, std=1.5 / WIDTH**0.5)
        self.head = linear(WIDTH, CLASSES)

    def forward(self, x):
        x = x.permute(0, 2, 1)  # B C N
        energy = torch.bmm(self.k_conv(x).permute(0, 2, 1), self.q_conv(x)) / 8**0.5  # B M N
        attention = torch.softmax(energy, dim=-1)
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
        x_r = torch.bmm(self.v_conv(x), attention)  # B C N
        return self.head((x - x_r).amax(dim=2))


def values_first_reference(m, sites, x):
    q, k, v = (conv(x.mT).mT for conv in (m.q_conv, m.k_conv, m.v_conv))
    return m.head((x - attend(q, k, v, sites[0])).amax(dim=1))


class Convolutions(nn.Module):
    """An image; one convolution for all three, head sizes before pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1, bias=False)
        nn.init.normal_(self.stem.weight, std=0.5)
        nn.init.normal_(self.qkv.weight, std=0.22)
        self.head = linear(WIDTH, CLASSES)

    def forward(self, image):
        x = self.stem(image)  # B C 4 4
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, HEADS, c // HEADS, h * w).unbind(1)  # B H D N
        sim = torch.einsum("bhdi,bhdj->bhij", q * (c // HEADS) ** -0.5, k)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        attn = sim.softmax(dim=-1)
        for _ in range(3):
            attn = F.normalize(attn, p=1.0, dim=-2, eps=1e-20)
            attn = F.normalize(attn, p=1.0, dim=-1, eps=1e-20)
        out = torch.einsum("bhij,bhdj->bhid", attn, v)
        out = out.permute(0, 1, 3, 2).reshape(b, c, h, w)
        return self.head((x + out).flatten(2).amax(dim=2))


def convolutions_reference(m, sites, image):
    x = m.stem(image)
    q, k, v = (split(part.flatten(2).mT, HEADS) for part in m.qkv(x).chunk(3, dim=1))
    return m.head((x.flatten(2).mT + merge(attend(q, k, v, sites[0]))).amax(dim=1))


def images(batch, generator):
    return {"image": torch.randn(batch, 3, 8, 8, generator=generator)}


class Windows(nn.Module):
    """Attention in four windows of an 8 x 8 grid, the windows merged into the batch."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = linear(WIDTH, 3 * WIDTH, 1.5), linear(WIDTH, CLASSES)

    def forward(self, grid):
        b, h, w, c = grid.shape
        x = grid.view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)  # B*4 N C
        q, k, v = self.qkv(x).view(-1, 16, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        log_p = (q * (c // HEADS) ** -0.5) @ k.transpose(-2, -1)  # B*4 H N N
        for _ in range(4):
            log_p = log_p.log_softmax(-2)
            log_p = log_p.log_softmax(-1)
        x = (log_p.exp() @ v).transpose(1, 2).reshape(b, h // 4, w // 4, 4, 4, c)
        return self.head(x.transpose(2, 3).reshape(b, h * w, c).amax(dim=1))


def windows_reference(m, sites, grid):
    windows = [grid[:, i : i + 4, j : j + 4].flatten(1, 2) for i in (0, 4) for j in (0, 4)]
    parts = [[split(part, HEADS) for part in m.qkv(window).chunk(3, dim=-1)] for window in windows]
    return m.head(torch.cat([merge(attend(*part, sites[0])) for part in parts], dim=1).amax(dim=1))


def grids(batch, generator):
    return {"grid": torch.randn(batch, 8, 8, WIDTH, generator=generator)}


class TwoProducts(nn.Module):
    """One plan moves both features and coordinates."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(WIDTH, WIDTH, 2.0), linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.head = linear(WIDTH + 3, CLASSES)

    def forward(self, x, xyz):
        scores = torch.bmm(self.q(x), self.k(x).mT) / WIDTH**0.5  # B N N
        f = -torch.logsumexp(scores, dim=2, keepdim=True)
        for _ in range(3):
            g = -torch.logsumexp(scores + f, dim=1, keepdim=True)
            f = -torch.logsumexp(scores + g, dim=2, keepdim=True)
        plan = torch.exp(scores + f + g)
        moved = torch.cat([plan @ self.v(x), plan @ xyz - xyz], dim=-1)
        return self.head(moved.amax(dim=1))


def two_products_reference(m, sites, x, xyz):
    plan = sinkhorn(m.q(x) @ m.k(x).mT / WIDTH**0.5 / sites[0].epsilon, sites[0])
    return m.head(torch.cat([plan @ m.v(x), plan @ xyz - xyz], dim=-1).amax(dim=1))


def points(batch, generator):
    return tokens(batch, generator) | {"xyz": torch.randn(batch, TOKENS, 3, generator=generator)}


class ReturnsMaps(FusedBNMH):
    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        maps = (q @ k.mT / math.sqrt(8)).exp()
        for _ in range(5):
            maps = maps / maps.sum(dim=-2, keepdim=True)
            maps = maps / maps.sum(dim=-1, keepdim=True)
        return self.head((maps @ v).transpose(1, 2).flatten(2).amax(dim=1)), maps


def returns_maps_reference(m, sites, x):
    q, k, v = (split(f(x), HEADS) for f in (m.q, m.k, m.v))
    maps = sinkhorn(q @ k.mT / 8**0.5 / sites[0].epsilon, sites[0])
    return m.head(merge(maps @ v).amax(dim=1)), maps


class Dropout(FusedBNMH):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (f(x).view(b, n, HEADS, c // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        for _ in range(3):
            att = F.log_softmax(att, dim=-2)
            att = F.log_softmax(att, dim=-1)
        att = self.drop(att.exp())
        y = F.dropout(att @ v, 0.1, training=self.training)
        return self.head(y.transpose(1, 2).contiguous().view(b, n, c).amax(dim=1))


class Block(nn.Module):
    """A transformer's block; Sinkhorn of `steps` half-steps that ends on rows, or softmax if that is 1."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = linear(WIDTH, 3 * WIDTH, 1.5), linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(linear(WIDTH, 2 * WIDTH), nn.GELU(), linear(2 * WIDTH, WIDTH))

    def attention(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        a = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        for left in reversed(range(self.steps)):
            a = a - a.logsumexp(dim=-2 if left % 2 else -1, keepdim=True)
        return self.proj((a.exp() @ v).transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, *steps, repeats=1):
        super().__init__()
        self.blocks = nn.ModuleList([Block(t) for t in steps])
        self.repeats = repeats
        self.norm, self.head = nn.LayerNorm(WIDTH), linear(WIDTH, CLASSES)

    def forward(self, x):
        for _ in range(self.repeats):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x).amax(dim=1))


def transformer_reference(m, sites, x):
    sites = list(sites)
    for block in [block for _ in range(m.repeats) for block in m.blocks]:
        site = sites.pop(0) if block.steps > 1 else Expected(1, "rows", 1.0)
        q, k, v = (split(t, HEADS) for t in block.qkv(block.norm1(x)).chunk(3, dim=-1))
        x = x + block.proj(merge(attend(q, k, v, site)))
        x = x + block.mlp(block.norm2(x))
    return m.head(m.norm(x).amax(dim=1))


def pairs(batch, generator):
    return tokens(batch, generator) | {"context": torch.randn(batch, 24, WIDTH, generator=generator)}


def transformer(name, steps, repeats=1):
    sites = tuple(Expected(t, "rows", 1.0) for t in steps * repeats if t > 1)
    return Case(name, lambda: Transformer(*steps, repeats=repeats), tokens, sites, reference=transformer_reference)


CASES = [
    case("cross", Cross, cross_reference, 8, "columns", inputs=pairs),
    case("cross_on_values", CrossOnValues, cross_reference, 8, "columns", inputs=pairs),
    case("learned_latents", LearnedLatents, latents_reference, 10, "rows"),
    case("slots", Slots, slots_reference, 2, "rows"),
    case("values_first", ValuesFirst, values_first_reference, 2, "rows", tolerance=1e-8),
    case("convolutions", Convolutions, convolutions_reference, 7, "rows", inputs=images),
    case("windows", Windows, windows_reference, 8, "rows", inputs=grids),
    case("two_products", TwoProducts, two_products_reference, 7, "rows", inputs=points),
    case("returns_maps", ReturnsMaps, returns_maps_reference, 10, "rows"),
    case("dropout", Dropout, separate_reference, 6, "rows"),
    transformer("several_sites", (3, 8, 20)),
    transformer("shared_layers", (6,), repeats=2),
    transformer("beside_softmax", (1, 8, 1)),
]
