"""Sinkhorn's loop and its exact gradient by matrix-vector products, for training.

The same function as the log-domain loop of asapc.models.vit; autograd through that takes several times as long.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Full iterations from one kernel. From a plan of which the columns and then the rows were normalised, an iteration
# changes no scaling by more than a factor N, so that float32 holds them however sharp the scores are.
STRETCH = 5


class Stretch(NamedTuple):
    """Iterations from one kernel; the scalings before and after each, as rows (..., 1, N or M)."""

    kernel: Tensor
    turned: Tensor  # the kernel's transpose: row times matrix is the faster product
    us: list[Tensor]
    vs: list[Tensor]


def trained_sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Return the plan of asapc.models.vit.sinkhorn."""
    plan: Tensor = ScalingForm.apply(scores, iterations)
    return plan


class ScalingForm(torch.autograd.Function):
    """The first iteration in the log domain, then stretches of scalings."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int) -> Tensor:
        """Map scores (..., N, M) to the plan."""
        log_plan = scores.log_softmax(dim=-2).log_softmax(dim=-1)
        stretches: list[Stretch] = []
        count = 1
        while not stretches or count < iterations:
            kernel = log_plan.softmax(dim=-1)  # exp, as rows sum to 1; exp itself is slow where it underflows
            turned = kernel.transpose(-1, -2).contiguous()
            us, vs = [torch.ones_like(turned[..., :1, :])], [torch.ones_like(kernel[..., :1, :])]
            for _ in range(min(STRETCH, iterations - count)):
                vs.append(1 / (us[-1] @ kernel))
                us.append(1 / (vs[-1] @ turned))
            stretches.append(Stretch(kernel, turned, us, vs))
            log_plan = log_plan + us[-1].transpose(-1, -2).log() + vs[-1].log()
            count += STRETCH
        plan = us[-1].transpose(-1, -2) * kernel * vs[-1]
        ctx.stretches = stretches
        ctx.save_for_backward(scores, plan)
        return plan

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Go back through log plan = scores + f + g: half-steps add outer products, which one product sums."""
        scores, plan = ctx.saved_tensors
        out = grad * plan
        f, g = out.sum(dim=-1).unsqueeze(-2), out.sum(dim=-2, keepdim=True)  # gradients of the duals
        for kernel, turned, us, vs in reversed(ctx.stretches):
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
        return out - g * scores.softmax(dim=-2), None
