"""The models of compositions, and inputs for them."""

import torch
import torch.nn.functional as F
from torch import nn

from .choices import AXES, HEAD_DIM
from .loops import Loop, Poisoned


class Composed(nn.Module):
    """The model of a composition; inputs are `x`, and `context` and `mask` where the composition has them."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.axes = AXES[c.layout]
        self.keys = c.tokens + 3 if c.cross else c.tokens
        self.width = c.heads * HEAD_DIM
        self.q, self.k, self.v = (nn.Linear(self.width, self.width, bias=False) for _ in range(3))
        for layer in (self.q, self.k, self.v):
            nn.init.normal_(layer.weight, std=self.width**-0.5)
        self.out = nn.Linear(self.width, self.width)
        n, m, h = c.tokens, self.keys, c.heads
        per_head = torch.linspace(0.6, 1.2, h) / c.sharpness
        if c.epsilon == "float":
            self.eps = 1 / c.sharpness
        elif c.epsilon == "buffer":
            self.register_buffer("eps", torch.tensor(1 / c.sharpness))
        elif c.epsilon == "log_per_head":
            self.log_eps = nn.Parameter(per_head.log())
        elif c.epsilon == "softplus":
            self.raw = nn.Parameter(per_head.expm1().log())
        else:
            self.inverse = nn.Parameter(1 / per_head)
        if c.bias == "relative":
            self.table = nn.Parameter(torch.randn(n + m, h))
        if c.bias == "pairs":
            self.left, self.right = nn.Linear(self.width, h), nn.Linear(self.width, h)
        if c.fold == "weights":
            self.q.weight.data.mul_(HEAD_DIM**-0.5)
        self.mass = nn.Parameter(F.softmax(torch.randn(m if c.marginals == "columns" else n), dim=0))
        self.noise = nn.Parameter(torch.randn(n, m))
        self.drop = nn.Dropout(0.2)

    @property
    def rows(self):
        """The axis that a half-step on rows sums over."""
        return self.axes.index("m")

    @property
    def columns(self):
        return self.axes.index("n")

    def laid_out(self, t, batch):
        """From (B or 1, H or 1, N or 1, M or 1) to the layout of the scores."""
        if self.axes == "znm":
            return t.expand(batch, self.c.heads, -1, -1).reshape(batch * self.c.heads, *t.shape[2:])
        if self.axes == "bnm":
            return t.squeeze(1)
        return t.permute([list("bhnm").index(a) for a in self.axes])

    def temperature(self):
        """A number, or (H,)."""
        if self.c.epsilon in ("float", "buffer"):
            return self.eps
        if self.c.epsilon == "log_per_head":
            return self.log_eps.exp()
        return F.softplus(self.raw) if self.c.epsilon == "softplus" else 1 / self.inverse

    def spread(self, x):
        """(B, N, C) to the layout's queries."""
        x = x.unflatten(-1, (self.c.heads, HEAD_DIM))
        if self.axes == "bhnm":
            return x.transpose(1, 2)
        if self.axes == "znm":
            return x.transpose(1, 2).reshape(-1, x.shape[1], HEAD_DIM)
        if self.axes == "hbnm":
            return x.permute(2, 0, 1, 3)
        return x.squeeze(2) if self.axes == "bnm" else x

    def multiply(self, q, k):
        if self.axes in ("bnmh", "bnhm"):
            return torch.einsum(f"bnhd,bmhd->{self.axes}", q, k)
        return torch.bmm(q, k.transpose(1, 2)) if self.axes in ("znm", "bnm") else q @ k.transpose(-1, -2)

    def apply(self, plan, v, vectors=None):
        if vectors is not None:
            v = self.beside(vectors[1], self.columns) * v
        inside = self.axes in ("bnmh", "bnhm")
        y = torch.einsum(f"{self.axes},bmhd->bnhd", plan, v) if inside else plan @ v
        if vectors is not None:
            y = self.beside(vectors[0], self.rows) * y
        if inside:
            return y.flatten(2)
        if self.axes == "znm":
            y = y.view(-1, self.c.heads, *y.shape[1:])
        if self.axes == "bnm":
            return y
        return (y.permute(1, 2, 0, 3) if self.axes == "hbnm" else y.transpose(1, 2)).flatten(2)

    def beside(self, vector, axis):
        """A scaling vector that lacks an axis of the scores, in the layout of queries or values."""
        letters = self.axes.replace(self.axes[axis], "")
        order = f"b{letters.strip('bhz')}h" if self.axes in ("bnmh", "bnhm") else letters
        return vector.squeeze(axis).permute([letters.index(letter) for letter in order]).unsqueeze(-1)

    def apply_transposed(self, plan, v):
        if self.axes in ("bnmh", "bnhm"):
            return torch.einsum(f"{self.axes},bnhd->bmhd", plan, v).flatten(2)
        y = plan.transpose(-1, -2) @ v
        if self.axes == "znm":
            y = y.view(-1, self.c.heads, *y.shape[1:])
        if self.axes == "bnm":
            return y
        return (y.permute(1, 2, 0, 3) if self.axes == "hbnm" else y.transpose(1, 2)).flatten(2)

    def scores(self, x, context):
        c, batch = self.c, x.shape[0]
        q, k = self.q(x).unflatten(-1, (c.heads, HEAD_DIM)), self.k(context).unflatten(-1, (c.heads, HEAD_DIM))
        eps = self.temperature()
        root = 1.0 if c.fold == "weights" else HEAD_DIM**0.5
        per_head = eps[:, None] if isinstance(eps, torch.Tensor) and eps.dim() else eps
        if c.fold == "queries":
            q = q / (per_head * root)
        elif c.fold == "keys":
            k = k / (per_head * root)
        elif c.fold == "both":
            q, k = q / (per_head * root) ** 0.5, k * (per_head * root) ** -0.5
        scores = self.multiply(self.spread(q.flatten(2)), self.spread(k.flatten(2)))
        if c.fold in ("scores", "weights", "cost"):
            if isinstance(eps, torch.Tensor) and eps.dim():
                eps = self.laid_out(eps[None, :, None, None], batch)
            scores = -((1 - scores / root) / eps) if c.fold == "cost" else scores / root / eps
        if c.bias == "relative":
            steps = torch.arange(c.tokens)[:, None] - torch.arange(self.keys)[None, :] + self.keys - 1
            scores = scores + self.laid_out(self.table[steps].permute(2, 0, 1)[None], batch)
        elif c.bias == "slopes":
            distance = (torch.arange(c.tokens)[:, None] - torch.arange(self.keys)[None, :]).abs()
            slopes = 2.0 ** -torch.arange(1, c.heads + 1)
            scores = scores - self.laid_out((slopes[:, None, None] * distance)[None], batch)
        elif c.bias == "pairs":
            pairs = F.relu(self.left(x)[:, :, None] + self.right(context)[:, None])  # B N M H
            scores = scores + self.laid_out(pairs.permute(0, 3, 1, 2), batch)
        return scores

    def forward(self, x, context=None, mask=None):
        c = self.c
        context = x if context is None else context
        scores = self.scores(x, context)
        live = None if mask is None else self.laid_out(mask[:, None, None, :], x.shape[0])
        if c.post == "double_inside":
            scores = scores.double()
        if c.poison != "none":
            plan = Poisoned(self, c.poison, x).plan(scores)
        else:
            plan = Loop(self, live).plan(scores)
        if c.post == "on_values":
            u, kernel, v = plan
            return self.out(self.apply(kernel, self.spread(self.v(context)), (u, v)))
        plan = plan.to(x.dtype)
        v = self.spread(self.v(context))
        if c.post == "dropout":
            plan = self.drop(plan)
        if c.post == "gated":
            plan = plan * torch.sigmoid(scores)
        if c.post == "transposed":
            return self.out(self.apply_transposed(plan, self.spread(self.v(x))))
        if c.post == "times_n":
            plan = plan * c.tokens
        y = self.out(self.apply(plan, v))
        if c.post == "two_products":
            return y + self.apply(plan, self.spread(context.cos()))
        return (y, plan) if c.post == "returned" else y


def inputs_of(c, batch, seed, padded=True):
    """Inputs for `Composed(c)`."""
    generator = torch.Generator().manual_seed(seed)
    width, keys = c.heads * HEAD_DIM, c.tokens + 3 if c.cross else c.tokens
    inputs = {"x": torch.randn(batch, c.tokens, width, generator=generator)}
    if c.cross or c.mask != "none":
        inputs["context"] = torch.randn(batch, keys, width, generator=generator)
    if c.mask != "none":
        lengths = torch.randint(3, keys + 1, (batch, 1), generator=generator)
        lengths[0].clamp_(max=keys - 1)  # else there would be no padding to see, now and then
        if batch > 1 and lengths[0] == lengths[1]:
            lengths[1] += 1  # nor would padding that all samples share tell a mask from another pattern
        inputs["mask"] = torch.arange(keys) < (lengths if padded else torch.full_like(lengths, keys))
    return inputs
