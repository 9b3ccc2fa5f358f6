"""The loops of compositions, and poisoned ones, which are something else."""

import math

import torch
import torch.nn.functional as F

from .choices import IN_LOG_DOMAIN
from .families import FAMILIES

INF = math.inf


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

    def means(self, scores):
        plan = self.kernel(scores - scores.amax(dim=(self.rows, self.columns), keepdim=True))
        for dim in self.dims:
            plan = plan / plan.mean(dim=dim, keepdim=True)
        return plan / plan.shape[self.dims[-1]]

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

    def sinkformer(self, scores):
        """Potentials of a cost, to uniform masses that sum to 1."""
        cost, sizes = -scores, {dim: scores.shape[self.rows + self.columns - dim] for dim in (self.rows, self.columns)}
        f = torch.zeros_like(scores.narrow(self.rows, 0, 1))
        g = torch.zeros_like(scores.narrow(self.columns, 0, 1))
        for dim in self.dims:
            missing = math.log(1 / sizes[dim]) - torch.logsumexp(-cost + f + g, dim=dim, keepdim=True)
            f, g = (f + missing, g) if dim == self.rows else (f, g + missing)
        return sizes[self.dims[-1]] * torch.exp(-cost + f + g)

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
        self.limit, self.constant = self.c.limit, self.c.constant

    def plan(self, scores):
        if self.poison in FAMILIES:
            return FAMILIES[self.poison](self, scores)
        name = f"poisoned_by_{self.poison}"
        if hasattr(self, name):
            return getattr(self, name)(scores)
        return self.log_loop(scores) if self.c.style in IN_LOG_DOMAIN else self.kernel_loop(scores)

    def loop(self, scores):
        """The loop itself, in the composition's style."""
        return super().plan(scores)

    def plain(self, scores, dims):
        """A loop in the log domain, over axes of its own."""
        for dim in dims:
            scores = scores - torch.logsumexp(scores, dim=dim, keepdim=True)
        return scores.exp()

    def log_plan(self, plan, before=None, total=None, after=None):
        """A loop in the log domain; the functions are given the number of a half-step and log(plan)."""
        for i, dim in enumerate(self.dims):
            plan = before(i, plan) if before else plan
            plan = plan - (total(i, plan) if total else torch.logsumexp(plan, dim=dim, keepdim=True))
            plan = after(i, plan) if after else plan
        return plan.exp()

    def dual_plan(self, scores, change):
        """A loop on potentials that are changed at each half-step."""
        f, g = self.dual_loop(scores, self.dims, lambda values, dim: change(self.lse(values, dim), dim))
        return (scores + f + g).exp()

    def vector_plan(self, scores, change):
        """A loop on scaling vectors that are changed at each half-step."""
        kernel = scores.exp()
        u, v = torch.ones_like(kernel.narrow(self.rows, 0, 1)), torch.ones_like(kernel.narrow(self.columns, 0, 1))
        for dim in self.dims:
            if dim == self.rows:
                u = change(1 / (kernel * v).sum(dim, keepdim=True))
            else:
                v = change(1 / (kernel * u).sum(dim, keepdim=True))
        return u * kernel * v

    def annealed_by(self, scores, eps):
        """A loop on potentials at a temperature of its own, in their own unit."""
        f, g = self.dual_loop(scores, self.dims, lambda values, dim: eps * self.lse(values / eps, dim))
        return ((scores + f + g) / eps).exp()

    def by_query(self):
        """A number for each query, laid out as the scores are."""
        return self.model.laid_out(self.x.mean(2)[:, None, :, None], self.x.shape[0])

    def padding(self, late=False):
        """The last query, or the last but one, of samples in which it stands out; on samples alike it may be none."""
        place = torch.arange(self.c.tokens) == self.c.tokens - 1 - late
        return self.model.laid_out(((self.x[..., 0] > 0.5) & place)[:, None, :, None], self.x.shape[0])

    def noise(self):
        return self.model.laid_out(self.model.noise[None, None], self.x.shape[0])

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
                log_plan = log_plan + 0.3 * self.noise() * (i % 3)
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

    def of_kernel(self, plan, guard=lambda total: total, entries=lambda plan: plan):
        """A loop by divisions; the functions change its sums, and the plan before each."""
        for dim in self.dims:
            plan = entries(plan)
            plan = plan / guard(plan.sum(dim=dim, keepdim=True))
        return plan

    def poisoned_by_sigmoid(self, scores):
        return self.of_kernel(torch.sigmoid(scores))

    def poisoned_by_relu(self, scores):
        return self.of_kernel(F.relu(scores), lambda total: total + 1e-6)

    def poisoned_by_squares(self, scores):
        return self.of_kernel(scores.square() + 1e-3)

    def poisoned_by_large_constant(self, scores):
        return self.of_kernel(scores.exp(), lambda total: total + 0.5)

    def poisoned_by_small_constant(self, scores):
        return self.of_kernel(scores.exp(), lambda total: total + 1e-3)

    def poisoned_by_causal(self, scores):
        n = scores.shape[self.columns]
        future = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        kernel = scores.exp().masked_fill(self.model.laid_out(future, self.x.shape[0]), 0.0)
        return self.of_kernel(kernel, lambda total: total + 1e-12)

    def poisoned_by_simultaneous(self, scores):
        plan = scores.exp()
        for _ in range(len(self.dims) // 2):
            plan = plan / (plan.sum(self.rows, keepdim=True) * plan.sum(self.columns, keepdim=True)).sqrt()
        return plan

    def poisoned_by_top_k(self, scores):
        best = scores.topk(4, dim=self.rows).values.narrow(self.rows, 3, 1)
        return self.of_kernel(scores.masked_fill(scores < best, -1e9).exp(), lambda total: total + 1e-12)
