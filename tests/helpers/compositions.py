"""Random attention models: independent choices of everything that code around a Sinkhorn loop differs in.

`CHOICES` holds the options of each choice; a `Composition` is one option of each. A poison makes the loop something
else.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

INF = math.inf
AXES = {"bhnm": "bhnm", "merged": "znm", "last": "bnmh", "inside": "bnhm", "first": "hbnm", "none": "bnm"}
HEAD_DIM = 4


@dataclass(frozen=True)
class Composition:
    """One model; see `CHOICES`."""

    style: str = "subtract"
    half_steps: int = 6
    last: str = "rows"
    epsilon: str = "float"
    fold: str = "scores"
    layout: str = "bhnm"
    bias: str = "none"
    mask: str = "none"
    padding_seen: bool = True  # whether the samples that the finder sees hold padding
    marginals: str = "none"
    cross: bool = False
    post: str = "plain"
    sharpness: float = 2.0
    heads: int = 2
    tokens: int = 8
    seed: int = 0
    poison: str = "none"

    def __str__(self):
        parts = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(parts) or "all defaults"


CHOICES = {
    "style": (
        "subtract",  # scores - logsumexp
        "log_softmax",
        "divide",
        "divide_in_place",
        "vectors_sum",  # scaling vectors, sums of products
        "vectors_matmul",
        "vectors_einsum",
        "potentials",  # that take on what is missing
        "duals",
        "softmax_end",  # duals, and a softmax as the last half-step
        "softmax_of_log",
        "normalize",  # torch.nn.functional.normalize with p=1
        "log_of_sum",  # duals by exp, sum and log
        "by_hand",  # logsumexp by hand
    ),
    "half_steps": (2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 20, 21, 40),
    "last": ("rows", "columns"),
    "epsilon": ("float", "buffer", "log_per_head", "softplus", "inverse_per_head"),
    "fold": ("scores", "queries", "keys", "both", "cost", "weights"),
    "layout": tuple(AXES),
    "bias": ("none", "none", "relative", "slopes", "pairs"),
    "mask": ("none", "none", "infinite", "finite", "zeros"),
    "padding_seen": (True,),
    "marginals": ("none", "none", "none", "columns", "rows"),
    "cross": (False, True),
    "post": (
        "plain",
        "plain",
        "dropout",
        "times_n",
        "returned",
        "transposed",
        "gated",
        "two_products",
        "double_inside",
        "on_values",  # the vectors scale values and result: no plan is built
    ),
    "sharpness": (0.7, 2.0, 4.0),
    "heads": (2, 3),
    "tokens": (6, 8, 11, 14),
    "seed": tuple(range(50)),
}
POISONS = (
    "damping",
    "weak_damping",
    "over_relaxed",
    "annealing",
    "noise",
    "sharpening",
    "sigmoid",
    "relu",
    "squares",
    "causal",
    "same_axis",
    "one_wrong_axis",
    "simultaneous",
    "maximum",
    "euclidean",
    "threshold",
    "floor",
    "large_constant",
    "small_constant",
    "temperature_by_sample",
    "across_heads",
    "across_samples",
    "scores_again",
    "power",
    "last_temperature",
    "averaged_plans",
    "one_marginal",
    "marginals_by_sample",
    "top_k",
)
IN_LOG_DOMAIN = ("subtract", "log_softmax", "potentials", "duals", "softmax_end", "log_of_sum", "by_hand")


def consistent(c):
    """The composition with choices that cannot go together replaced."""
    if c.layout == "none":
        c = replace(c, heads=1)
    if c.poison != "none" and c.post == "on_values":
        c = replace(c, post="plain")
    if c.post == "on_values" and not c.style.startswith("vectors"):
        c = replace(c, style="vectors_sum")
    if c.style == "vectors_matmul" and AXES[c.layout][-2:] != "nm":
        c = replace(c, style="vectors_sum")
    if c.poison != "none":
        c = replace(c, mask="none", marginals="none")
    if c.poison in ("causal", "same_axis"):
        c = replace(c, cross=False)
    if c.mask == "finite" and c.style not in ("subtract", "log_softmax", "divide", "divide_in_place"):
        c = replace(c, mask="infinite")  # the others would bring padding back to life
    if c.mask == "zeros" and c.style not in ("divide", "divide_in_place", "vectors_sum", "vectors_matmul"):
        c = replace(c, mask="infinite")
    if c.marginals != "none":
        if c.style not in ("subtract", "divide", "vectors_sum", "potentials", "duals"):
            c = replace(c, style="vectors_sum" if c.post == "on_values" else "duals")
        c = replace(c, mask="none", post="plain" if c.post == "gated" else c.post)
    return c


def pick(random, poisoned):
    """A composition drawn with a `random.Random`."""
    drawn = {name: random.choice(options) for name, options in CHOICES.items()}
    return consistent(Composition(**drawn, poison=random.choice(POISONS) if poisoned else "none"))


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


class Loop:
    """The half-steps of a composition in its style."""

    def __init__(self, model, live):
        self.c, self.live, self.rows, self.columns, self.axes = model.c, live, model.rows, model.columns, model.axes
        first = {"rows": model.rows, "columns": model.columns}[self.c.last]
        second = model.rows + model.columns - first
        self.dims = [first if (self.c.half_steps - i) % 2 else second for i in range(self.c.half_steps)]
        self.mass = {}
        if self.c.marginals != "none":
            axis, letter = (model.rows, "n") if self.c.marginals == "rows" else (model.columns, "m")
            self.mass[axis] = model.mass.view([-1 if a == letter else 1 for a in model.axes])

    def plan(self, scores):
        if self.live is not None:
            if self.c.mask == "zeros":
                scores = torch.where(self.live, scores, 0.0)
            else:
                scores = scores.masked_fill(~self.live, -INF if self.c.mask == "infinite" else -1e9)
        return getattr(self, self.c.style)(scores)

    def again(self, scores):
        """Fill what is masked a second time, where a half-step may have brought it to life."""
        return scores.masked_fill(~self.live, -1e9) if self.c.mask == "finite" else scores

    def lse(self, scores, dim):
        total = torch.logsumexp(scores, dim=dim, keepdim=True)
        if self.live is not None:
            total = total.masked_fill(total == -INF, 0.0)
        return total - self.mass[dim].log() if dim in self.mass else total

    def total(self, plan, dim):
        return self.safe(plan.sum(dim=dim, keepdim=True), dim)

    def safe(self, total, dim):
        if self.live is not None:
            total = torch.where(total > 0, total, 1.0)
        return total / self.mass[dim] if dim in self.mass else total

    def kernel(self, scores):
        kernel = torch.exp(scores)
        return kernel * self.live.to(kernel.dtype) if self.c.mask == "zeros" else kernel

    def subtract(self, scores):
        for dim in self.dims:
            scores = self.again(scores - self.lse(scores, dim))
        return scores.exp()

    def log_softmax(self, scores):
        for dim in self.dims:
            scores = self.again(scores.log_softmax(dim=dim))
            if self.c.mask == "infinite":
                scores = scores.nan_to_num(nan=-INF, neginf=-INF)
        return torch.exp(scores)

    def divide(self, scores):
        plan = self.kernel(scores - scores.amax(dim=(self.rows, self.columns), keepdim=True))
        for dim in self.dims:
            plan = plan / self.total(plan, dim)
        return plan

    def divide_in_place(self, scores):
        plan = self.kernel(scores)
        for dim in self.dims:
            plan /= self.total(plan, dim)
        return plan

    def vectors(self, scores, multiply):
        kernel = self.kernel(scores)
        u = torch.ones_like(kernel.narrow(self.rows, 0, 1))
        v = torch.ones_like(kernel.narrow(self.columns, 0, 1))
        for dim in self.dims:
            if dim == self.rows:
                u = 1.0 / self.safe(multiply(kernel, v, dim), dim)
            else:
                v = 1.0 / self.safe(multiply(kernel, u, dim), dim)
        return (u, kernel, v) if self.c.post == "on_values" else u * kernel * v

    def vectors_sum(self, scores):
        return self.vectors(scores, lambda kernel, vector, dim: (kernel * vector).sum(dim=dim, keepdim=True))

    def vectors_matmul(self, scores):
        def multiply(kernel, vector, dim):
            return kernel @ vector.mT if dim == self.rows else (kernel.mT @ vector.reshape(vector.shape)).mT

        return self.vectors(scores, multiply)

    def vectors_einsum(self, scores):
        def multiply(kernel, vector, dim):
            axes, rest = self.axes, self.axes.replace(self.axes[dim], "")
            other = axes.replace("n" if self.axes[dim] == "m" else "m", "")
            vector = vector.squeeze(self.rows + self.columns - dim)
            return torch.einsum(f"{axes},{other}->{rest}", kernel, vector).unsqueeze(dim)

        return self.vectors(scores, multiply)

    def potentials(self, scores):
        f = torch.zeros_like(scores.narrow(self.rows, 0, 1))
        g = torch.zeros_like(scores.narrow(self.columns, 0, 1))
        for dim in self.dims:
            if dim == self.rows:
                f = f - self.lse(scores + f + g, dim)
            else:
                g = g - self.lse(scores + f + g, dim)
        return torch.exp(scores + f + g)

    def dual_loop(self, scores, dims, lse):
        f = torch.zeros_like(scores.narrow(self.rows, 0, 1))
        g = torch.zeros_like(scores.narrow(self.columns, 0, 1))
        for dim in dims:
            if dim == self.rows:
                f = -lse(scores + g, dim)
            else:
                g = -lse(scores + f, dim)
        return f, g

    def duals(self, scores):
        f, g = self.dual_loop(scores, self.dims, self.lse)
        return (scores + f + g).exp()

    def softmax_end(self, scores):
        f, g = self.dual_loop(scores, self.dims[:-1], self.lse)
        plan = torch.softmax(scores + (g if self.dims[-1] == self.rows else f), dim=self.dims[-1])
        return plan if self.live is None else plan.nan_to_num(0.0)

    def softmax_of_log(self, scores):
        plan = scores.softmax(dim=self.dims[0])
        for dim in self.dims[1:]:
            plan = plan.nan_to_num(0.0).log().softmax(dim=dim)
        return plan if self.live is None else plan.nan_to_num(0.0)

    def normalize(self, scores):
        plan = scores.exp()
        for dim in self.dims:
            plan = F.normalize(plan, p=1, dim=dim, eps=1e-20)
        return plan

    def log_of_sum(self, scores):
        def lse(values, dim):
            return self.total(values.exp(), dim).log()

        f, g = self.dual_loop(scores, self.dims, lse)
        return (scores + f + g).exp()

    def by_hand(self, scores):
        for dim in self.dims:
            top = scores.max(dim=dim, keepdim=True).values
            if self.live is not None:
                top = top.masked_fill(top == -INF, 0.0)
            scores = scores - (top + self.total((scores - top).exp(), dim).log())
        return torch.exp(scores)


class Poisoned(Loop):
    """Loops that are something else than Sinkhorn, in the log domain or on a kernel, by the composition's style."""

    def __init__(self, model, poison, x):
        super().__init__(model, None)
        self.model, self.poison, self.x = model, poison, x

    def plan(self, scores):
        name = f"poisoned_by_{self.poison}"
        if hasattr(self, name):
            return getattr(self, name)(scores)
        return self.log_loop(scores) if self.c.style in IN_LOG_DOMAIN else self.kernel_loop(scores)

    def log_loop(self, scores):
        """Poisons of single half-steps, in the log domain."""
        p, middle = self.poison, len(self.dims) // 2
        dims = list(self.dims)
        if p == "same_axis":
            dims = [dims[-1]] * len(dims)
        if p == "one_wrong_axis":
            dims[middle] = self.rows + self.columns - dims[middle]
        if p == "temperature_by_sample":
            others = [axis for axis in range(scores.dim()) if self.axes[axis] not in "bz"]
            scores = scores / scores.std(dim=others, keepdim=True)
        log_plan = scores
        for i, dim in enumerate(dims):
            if p == "noise":
                noise = self.model.laid_out(self.model.noise[None, None], self.x.shape[0])
                log_plan = log_plan + 0.3 * noise * (i % 3)
            if p == "sharpening":
                log_plan = 1.1 * log_plan
            if p == "scores_again" and i == len(dims) - 1:
                log_plan = log_plan + 0.1 * scores
            if p == "last_temperature" and i == len(dims) - 1:
                log_plan = log_plan / 0.8
            reduced = (dim, self.axes.index("h")) if p == "across_heads" and "h" in self.axes else (dim,)
            reduced = (dim, self.axes.index("b")) if p == "across_samples" and "b" in self.axes else reduced
            if p == "maximum":
                total = log_plan.amax(dim=reduced, keepdim=True)
            elif p == "euclidean":
                total = torch.logsumexp(2 * log_plan, dim=reduced, keepdim=True) / 2
            else:
                total = torch.logsumexp(log_plan, dim=reduced, keepdim=True)
            if p == "one_marginal" and i == middle:
                size = scores.shape[self.rows + self.columns - dim]
                bump = torch.linspace(-1, 1, size)
                total = total + bump.view(
                    [-1 if a == self.rows + self.columns - dim else 1 for a in range(scores.dim())]
                )
            if p == "marginals_by_sample" and dim == self.columns:
                mass = self.x.mean(dim=(1, 2))  # B
                ramp = torch.linspace(-1, 1, scores.shape[self.rows])
                total = total + self.model.laid_out((mass[:, None] * ramp)[:, None, None, :], self.x.shape[0])
            log_plan = log_plan - total
            if p == "floor":
                log_plan = log_plan.clamp(min=math.log(1e-3))
        plan = log_plan.exp()
        if p == "power":
            return plan**1.5
        if p == "averaged_plans":
            return (plan + scores.softmax(dim=dims[-1])) ** 0.5
        if p == "threshold":
            plan = plan * (plan > 0.02)
            return plan / plan.sum(dim=dims[-1], keepdim=True)
        return plan

    def kernel_loop(self, scores):
        """The same poisons on a kernel, where they have a form of their own there."""
        p = self.poison
        if p in ("large_constant", "small_constant", "floor", "maximum", "euclidean"):
            plan = torch.exp(scores)
            for dim in self.dims:
                if p == "maximum":
                    plan = plan / plan.amax(dim=dim, keepdim=True)
                elif p == "euclidean":
                    plan = F.normalize(plan, dim=dim)
                elif p == "floor":
                    plan = (plan / plan.sum(dim=dim, keepdim=True)).clamp(min=1e-3)
                else:
                    plan = plan / (plan.sum(dim=dim, keepdim=True) + (0.5 if p == "large_constant" else 1e-3))
            return plan
        return self.log_loop(scores)

    def damped(self, scores, factor):
        def lse(values, dim):
            return factor * torch.logsumexp(values, dim=dim, keepdim=True)

        f, g = self.dual_loop(scores, self.dims, lse)
        return (scores + f + g).exp()

    def poisoned_by_damping(self, scores):
        return self.damped(scores, 0.8)

    def poisoned_by_weak_damping(self, scores):
        return self.damped(scores, 0.995)

    def poisoned_by_over_relaxed(self, scores, omega=1.3):
        f = torch.zeros_like(scores.narrow(self.rows, 0, 1))
        g = torch.zeros_like(scores.narrow(self.columns, 0, 1))
        for dim in self.dims:
            if dim == self.rows:
                f = (1 - omega) * f - omega * self.lse(scores + g, dim)
            else:
                g = (1 - omega) * g - omega * self.lse(scores + f, dim)
        return (scores + f + g).exp()

    def poisoned_by_annealing(self, scores):
        f = torch.zeros_like(scores.narrow(self.rows, 0, 1))
        g = torch.zeros_like(scores.narrow(self.columns, 0, 1))
        for i, dim in enumerate(self.dims):
            eps = max(1.0, 2.0 ** (len(self.dims) - i - 2))
            if dim == self.rows:
                f = -eps * torch.logsumexp((scores + g) / eps, dim=dim, keepdim=True)
            else:
                g = -eps * torch.logsumexp((scores + f) / eps, dim=dim, keepdim=True)
        return (scores + f + g).exp()

    def of_kernel(self, plan, constant=0.0):
        for dim in self.dims:
            plan = plan / (plan.sum(dim=dim, keepdim=True) + constant)
        return plan

    def poisoned_by_sigmoid(self, scores):
        return self.of_kernel(torch.sigmoid(scores))

    def poisoned_by_relu(self, scores):
        return self.of_kernel(F.relu(scores), 1e-6)

    def poisoned_by_squares(self, scores):
        return self.of_kernel(scores.square() + 1e-3)

    def poisoned_by_large_constant(self, scores):
        return self.of_kernel(scores.exp(), 0.5)

    def poisoned_by_small_constant(self, scores):
        return self.of_kernel(scores.exp(), 1e-3)

    def poisoned_by_causal(self, scores):
        n = scores.shape[self.columns]
        future = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        return self.of_kernel(scores.exp().masked_fill(self.model.laid_out(future, self.x.shape[0]), 0.0), 1e-12)

    def poisoned_by_simultaneous(self, scores):
        plan = scores.exp()
        for _ in range(len(self.dims) // 2):
            plan = plan / (plan.sum(self.rows, keepdim=True) * plan.sum(self.columns, keepdim=True)).sqrt()
        return plan

    def poisoned_by_top_k(self, scores):
        best = scores.topk(4, dim=self.rows).values.narrow(self.rows, 3, 1)
        return self.of_kernel(scores.masked_fill(scores < best, -1e9).exp(), 1e-12)


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
        inputs["mask"] = torch.arange(keys) < (lengths if padded else torch.full_like(lengths, keys))
    return inputs
