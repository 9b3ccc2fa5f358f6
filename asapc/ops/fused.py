"""Half-steps without scores: each a pass of the runtime's own fused attention, in memory linear in N.

A half-step on rows is a log-sum-exp over the keys, by which attention divides without returning it. One more key, whose
score is known, reveals it: the log-sum-exp over the others follows from the share that attention gives to that key. A
dual is one more channel of its points, against ones on the other side. So a runtime needs nothing but softmax(q k^T) v,
which it has in a form that never stores the scores (FlashAttention, arXiv 2205.14135). Masked keys get a dual that
gives them no mass: an actual mask would disable fast kernels.
"""

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from asapc.ops.features import mean

# The share of the known score is clamped to these, so that logarithms are finite. It is at most 1/2, up to rounding.
MIN_SHARE, MAX_SHARE = 1e-37, 0.75
# Kernels for half precision load this many channels at once. Other numbers of channels take twice the time.
ALIGNED_CHANNELS = 8
# Replaces 1 in the column that yields the share: a power of two, with which float16 holds shares down to 4e-12.
MAX_COLUMN = 2.0**14
# Dual of masked points, within float16 and far below all others.
MASKED_DUAL = -1e4


@torch.library.custom_op("asapc::attention", mutates_args=())
def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return softmax(queries keys^T) values, (B, H, N, E), of (B, H, N, D), (B, H, M, D) and (B, H, M, E).

    It is an operation of its own, so that exporters recognise it and write the runtime's counterpart.
    """
    return scaled_dot_product_attention(queries, keys, values, scale=1.0)


@attention.register_fake
def _(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return queries.new_empty(*queries.shape[:-1], values.shape[-1])


def keep_operands(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> None:
    """Keep what gradients need: the operands, from which the scores are computed again."""
    ctx.save_for_backward(*inputs)


def attention_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gradients of queries, keys and values; unlike `attention` this holds the scores."""
    queries, keys, values = ctx.saved_tensors
    weights = torch.softmax(queries @ keys.mT, dim=-1)
    of_weights = gradient @ values.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True))
    return of_scores @ keys, of_scores.mT @ queries, weights.mT @ gradient


attention.register_autograd(attention_gradients, setup_context=keep_operands)
ATTENTION = torch.ops.asapc.attention.default


def with_dual(points: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """Append their dual (B, H, 1, N) to points (B, H, N, D) as one more channel.

    Half-precision points get two, the second for the rounding error of the first: products are summed in float32, and
    an error of 0.01 in a dual of 30 is one of 1 % in the plan. Zeros fill up to `width` channels.
    """
    dual = dual.transpose(-1, -2)
    if not in_half(points):
        return torch.cat([points, dual], dim=-1)
    high = dual.to(points.dtype)
    parts = torch.cat([high, (dual - high).to(points.dtype)], dim=-1)
    return torch.cat([points, pad(parts, (0, width(points) - points.shape[-1] - 2))], dim=-1)


def with_ones(points: torch.Tensor) -> torch.Tensor:
    """Append channels of ones to points (B, H, N, D), which multiply the dual of the other side."""
    ones = points.new_ones(*points.shape[:-1], width(points) - points.shape[-1])
    return torch.cat([points, ones], dim=-1)


def width(points: torch.Tensor) -> int:
    """Count the channels of points (B, H, N, D) with a dual: in half precision a number that kernels are fast with."""
    channels = points.shape[-1]
    return -(-(channels + 2) // ALIGNED_CHANNELS) * ALIGNED_CHANNELS if in_half(points) else channels + 1


def in_half(points: torch.Tensor) -> bool:
    """Return whether points are in half precision, which their duals never are."""
    return points.dtype.itemsize <= 2


def half_step(
    points: torch.Tensor,
    others: torch.Tensor,
    dual: torch.Tensor | None,
    live: torch.Tensor | None = None,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the dual (B, H, 1, N) that normalises the points' axis: log mass_i - logsumexp_j(p_i . others_j + dual_j).

    The known score is the mean of all others, plus the logarithm of their number. By Jensen's inequality the
    log-sum-exp is no less, so the key with that score gets at most half, and the others get one minus that, without
    cancellation. Everything large that does not depend on the dual is the same for every half-step of these points, and
    appears in a graph once: exporters share it.

    Args:
        points: (B, H, N, D); products with the others are scores, in units of the temperature.
        others: (B, H, M, D).
        dual: (B, H, 1, M), float32 where points are in half precision; None for 0.
        live: (B, H, 1, M), 1 where one of the others takes part and 0 where it is masked; None for 1.
        mass: (1,) or (N,), what the points' axis is normalised to; None for 1.
    """
    exact = torch.promote_types(points.dtype, torch.float32)
    # A mean over an axis other than the last takes longer than a product with ones, on GPUs by far.
    weights = torch.ones_like(others[..., :1], dtype=exact).transpose(-1, -2) if live is None else live.to(exact)
    count = weights.sum(dim=-1, keepdim=True).clamp_min(1)
    centre = weights @ others.to(exact) / count
    dual = torch.zeros_like(weights) if dual is None else dual
    level = mean(dual, live) + torch.log(count)
    # After subtracting centre and level, the last key, whose score is known, is 0.
    centred = (torch.cat([others.to(exact), centre], dim=-2) - centre).to(points.dtype)
    keys = with_dual(centred, pad(masked(dual - level, live), (0, 1)))
    zeros = torch.zeros_like(with_ones(others) if in_half(others) else others[..., :1])
    column = attention(with_ones(points), keys, pad(zeros, (0, 0, 0, 1), value=MAX_COLUMN))[..., :1]
    share = (column.to(exact).transpose(-1, -2) / MAX_COLUMN).clamp(MIN_SHARE, MAX_SHARE)
    step = torch.log(share) - torch.log1p(-share) - level - centre @ points.to(exact).transpose(-1, -2)
    return step if mass is None else step + mass.log()


def masked(dual: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Replace the entries of a dual (B, H, 1, M) that are masked, so that they get no mass."""
    return dual if live is None else dual * live + (1 - live) * MASKED_DUAL


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    dual: torch.Tensor | None,
    values: torch.Tensor,
    live: torch.Tensor | None = None,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take the last half-step, on rows, and multiply with values: mass_i * softmax_j(q_i . k_j + dual_j) @ values.

    Only keys that are `live` count, see `half_step`; the result is 0 where none is. `mass` is (1,) or (N,), None for 1.
    """
    if live is not None:
        dual = torch.zeros_like(live) if dual is None else dual
        values = values * live.amax(dim=-1, keepdim=True).to(values.dtype)
        dual = masked(dual - mean(dual, live), live)
    elif dual is not None:
        dual = dual - dual.mean(dim=-1, keepdim=True)
    else:
        return of_mass(attention(queries, keys, values), mass)
    biased = with_dual(keys, dual)
    # Kernels for half precision need the same number of channels everywhere.
    more = max(width(queries) - values.shape[-1], 0) if in_half(queries) else 0
    output: torch.Tensor = attention(with_ones(queries), biased, pad(values, (0, more)) if more else values)
    return of_mass(output[..., : values.shape[-1]] if more else output, mass)


def of_mass(output: torch.Tensor, mass: torch.Tensor | None) -> torch.Tensor:
    """Multiply the rows of an output (B, H, N, E) by their masses."""
    return output if mass is None else output * mass.unsqueeze(-1).to(output.dtype)
