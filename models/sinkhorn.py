"""Sinkhorn attention (Sander et al., "Sinkformers", AISTATS 2022) in three forms that compute one function.

`log` is the loop as it is usually written, and what asapc compiles. Autograd keeps several matrices of each iteration
of it. `scaling` keeps one for several iterations, and goes back through them by matrix-vector products, in a fraction
of the time; `recompute` keeps vectors alone, and computes the matrices again on its way back. Shapes as in kernel.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asapc.models.kernel import Kernel, columns_of, hide, keep, live_pairs, require_positive, rows_of

# Full iterations from one kernel. From a plan of which the columns and then the rows were normalised, an iteration
# changes no scaling by more than a factor N or M, so that float32 holds them however sharp the scores are.
STRETCH = 5


def sinkhorn(
    scores: Tensor, iterations: int, query_mask: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """Compute the plan of scores (..., N, M) by Sinkhorn's algorithm in the log domain.

    Columns are scaled to one sum, which is N / M in the end, then rows to 1, by turns.

    Args:
        scores: (..., N, M); (B, H, N, M) where there are masks.
        iterations: full ones, of two half-steps.
        query_mask: (B, N), true where a query is real; None where all are.
        key_mask: (B, M), likewise.
    """
    rows, columns = rows_of(query_mask), columns_of(key_mask)
    live = live_pairs(rows, columns)
    log_plan = hide(scores, live)
    for _ in range(iterations):  # padding has no sum, and is left as it is
        log_plan = log_plan - keep(torch.logsumexp(log_plan, dim=-2, keepdim=True), columns, 0.0)
        log_plan = log_plan - keep(torch.logsumexp(log_plan, dim=-1, keepdim=True), rows, 0.0)
    return keep(log_plan.exp(), live, 0.0)


def scaled_sinkhorn(
    scores: Tensor,
    iterations: int,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return what `sinkhorn` does, with a gradient of its own.

    Args:
        scores: as of `sinkhorn`.
        iterations: likewise, at least 1.
        query_mask: likewise.
        key_mask: likewise.
        recompute: whether of all matrices the first plan and the last alone are kept for the gradient.
    """
    live = live_pairs(rows_of(query_mask), columns_of(key_mask))
    plan: Tensor = ScalingForm.apply(hide(scores, live), live, iterations, recompute)
    return plan


class Stretch(NamedTuple):
    """Iterations from one kernel, exp(start + f + g), with start for log plan after the first iteration.

    Attributes:
        f: dual of the rows (..., N, 1) at its start.
        g: dual of the columns (..., 1, M).
        us: scalings of the rows (..., S, N) at its start, which are 1, and after each iteration.
        vs: scalings of the columns (..., S, M).
        kernel: (..., N, M); None where it is to be computed again.
    """

    f: Tensor
    g: Tensor
    us: Tensor
    vs: Tensor
    kernel: Tensor | None


def kernel_of(start: Tensor, f: Tensor, g: Tensor, live: Tensor | None) -> Tensor:
    """Return exp(start + f + g), of which rows sum to 1; exp itself is slow where it underflows."""
    return keep(torch.softmax(start + f + g, dim=-1), live, 0.0)


def turn(matrix: Tensor) -> Tensor:
    """Return the transpose in memory of its own: row times matrix is the faster product."""
    return matrix.transpose(-1, -2).contiguous()


class ScalingForm(torch.autograd.Function):
    """The first iteration in the log domain, then stretches of scalings, from duals that take them up."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, live: Tensor | None, iterations: int, recompute: bool) -> Tensor:
        """Map hidden scores (..., N, M) to the plan."""
        rows = None if live is None else live.any(dim=-1, keepdim=True)
        columns = None if live is None else live.any(dim=-2, keepdim=True)
        of_us = None if rows is None else rows.transpose(-1, -2)
        by_columns = hide(torch.log_softmax(scores, dim=-2), live)
        start = hide(torch.log_softmax(by_columns, dim=-1), live)
        shift = by_columns.amax(dim=-1, keepdim=True) - start.amax(dim=-1, keepdim=True)  # what rows were scaled by
        f, g = torch.zeros_like(shift), torch.zeros_like(start[..., :1, :])
        stretches: list[Stretch] = []
        count = 1
        while not stretches or count < iterations:
            kernel = kernel_of(start, f, g, live)
            turned = turn(kernel)
            us, vs = [torch.ones_like(turned[..., :1, :])], [torch.ones_like(kernel[..., :1, :])]
            for _ in range(min(STRETCH, iterations - count)):
                vs.append(1 / keep(us[-1] @ kernel, columns, 1.0))
                us.append(1 / keep(vs[-1] @ turned, of_us, 1.0))
            all_us, all_vs = torch.cat(us, dim=-2), torch.cat(vs, dim=-2)
            stretches.append(Stretch(f, g, all_us, all_vs, None if recompute else kernel))
            f, g = f + us[-1].transpose(-1, -2).log(), g + vs[-1].log()
            count += STRETCH
        plan = us[-1].transpose(-1, -2) * kernel * vs[-1]
        ctx.save_for_backward(start, shift, live, plan, *(tensor for stretch in stretches for tensor in stretch))
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Go back through log plan = scores + f + g: half-steps add outer products, which one product sums."""
        start, shift, live, plan, *saved = ctx.saved_tensors
        size = len(Stretch._fields)
        stretches = [Stretch(*saved[i : i + size]) for i in range(0, len(saved), size)]
        out = grad * plan
        f, g = out.sum(dim=-1).unsqueeze(-2), out.sum(dim=-2, keepdim=True)  # gradients of the duals
        for stretch in reversed(stretches):
            kernel = stretch.kernel
            if kernel is None:
                kernel = kernel_of(start, stretch.f, stretch.g, live)
            turned = turn(kernel)
            us, vs = (scalings.split(1, dim=-2) for scalings in (stretch.us, stretch.vs))
            left, right = [], []
            for t in reversed(range(1, len(us))):
                left.append(f * us[t])  # rows: f_t = -LSE_j(scores + g_t)
                right.append(vs[t])
                g = g - vs[t] * (left[-1] @ kernel)
                left.append(us[t - 1])  # columns: g_t = -LSE_i(scores + f_(t-1))
                right.append(g * vs[t])
                f, g = -us[t - 1] * (right[-1] @ turned), torch.zeros_like(g)
            if left:
                out = out - kernel * (torch.cat(left, dim=-2).transpose(-1, -2) @ torch.cat(right, dim=-2))
        out = out - f.transpose(-1, -2) * kernel  # the first iteration, whose plan is the first kernel
        g = g - f @ kernel
        return out - g * torch.softmax(start + shift, dim=-2), None, None, None


Form = Callable[[Tensor, int, Tensor | None, Tensor | None], Tensor]
FORMS: dict[str, Form] = {
    "log": sinkhorn,
    "scaling": scaled_sinkhorn,
    "recompute": partial(scaled_sinkhorn, recompute=True),
}


class Sinkhorn(Kernel):
    """Rows sum to 1, and columns, the more iterations the closer, to N / M of what is real.

    Args:
        epsilon: temperature of the scores q k^T / sqrt(D).
        iterations: full ones, of columns and then rows; at least 1.
        form: "log", "scaling" or "recompute". It may be set anew at any time: train in one, and compile in another.

    Raises:
        ValueError: a number is not above zero, or there is no such form.
    """

    def __init__(self, epsilon: float = 0.25, iterations: int = 20, form: str = "log") -> None:
        super().__init__()
        require_positive(epsilon=epsilon, iterations=iterations)
        if form not in FORMS:
            raise ValueError(f"there is no form {form!r} of Sinkhorn attention; there are {', '.join(FORMS)}")
        self.epsilon, self.iterations, self.form = epsilon, iterations, form

    def plan(self, q: Tensor, k: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Return the plan of q k^T / (sqrt(D) epsilon); see `Kernel.plan`."""
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return FORMS[self.form](scores / self.epsilon, self.iterations, query_mask, key_mask)
