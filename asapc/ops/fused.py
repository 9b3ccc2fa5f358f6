"""Half-steps without scores: each a pass of the runtime's own fused attention, in memory linear in N.

A half-step on rows is a log-sum-exp over the keys, which is what attention divides by and does not tell. It tells it
beside one more key whose score is known: from the share that attention gives to that key follows the log-sum-exp over
the others. A dual is one more channel of the points that it
belongs to, against ones on the other side. So all that a runtime needs is softmax(q k^T) v, which it has in a form
that never holds the scores (FlashAttention, arXiv 2205.14135). Keys that are masked get a dual that leaves nothing to
them: a mask of its own would switch fast kernels off.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from asapc.ops.features import mean

# What attention gives to the known score is held between these, so that logarithms are finite. It is no more than 1/2
# but for rounding.
MIN_SHARE, MAX_SHARE = 1e-37, 0.75
# Kernels for half precision load so many channels at once. They take other numbers of channels, in twice the time.
ALIGNED_CHANNELS = 8
# What stands for 1 in the column that tells the share: a power of two, with which float16 holds shares down to 4e-12.
MAX_COLUMN = 2.0**14
# Dual of what is masked, within float16 and far below all that is not.
MASKED_DUAL = -1e4


@torch.library.custom_op("asapc::attention", mutates_args=())
def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(queries keys^T) values, (B, H, N, E), of (B, H, N, D), (B, H, M, D) and (B, H, M, E).

    An operation of its own, so that exporters find it and write what the runtime has for it.
    """
    return scaled_dot_product_attention(queries, keys, values, scale=1.0)


@attention.register_fake
def _(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return queries.new_empty(*queries.shape[:-1], values.shape[-1])


def with_dual(points: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """Points (B, H, N, D) with their dual (B, H, 1, N) for one more channel.

    Half-precision points get two, of which the second is what the first leaves off: their products are added up in
    float32, and a dual of 30 that is off by 0.01 is a plan that is off by 1 %. Zeros fill up to `width` channels.
    """
    dual = dual.transpose(-1, -2)
    if not in_half(points):
        return torch.cat([points, dual], dim=-1)
    high = dual.to(points.dtype)
    parts = torch.cat([high, (dual - high).to(points.dtype)], dim=-1)
    return torch.cat([points, pad(parts, (0, width(points) - points.shape[-1] - 2))], dim=-1)


def with_ones(points: torch.Tensor) -> torch.Tensor:
    """Points (B, H, N, D) with channels of ones, against which those of the other side's dual stand."""
    ones = points.new_ones(*points.shape[:-1], width(points) - points.shape[-1])
    return torch.cat([points, ones], dim=-1)


def width(points: torch.Tensor) -> int:
    """Channels of points (B, H, N, D) with a dual: in half precision as many as kernels are fast with."""
    channels = points.shape[-1]
    return -(-(channels + 2) // ALIGNED_CHANNELS) * ALIGNED_CHANNELS if in_half(points) else channels + 1


def in_half(points: torch.Tensor) -> bool:
    """Whether points are in half precision, which their duals never are."""
    return points.dtype.itemsize <= 2


def half_step(
    points: torch.Tensor, others: torch.Tensor, dual: torch.Tensor | None, live: torch.Tensor | None = None
) -> torch.Tensor:
    """Dual (B, H, 1, N) of points for which their axis is normalised: -logsumexp_j(points_i . others_j + dual_j).

    The known score is the mean of all others, plus the logarithm of their number. By Jensen's inequality the
    log-sum-exp is no less, so that no more than half goes to the key with that score, and what goes to the others is
    one less that, without cancellation. All that is large and does not depend on the dual is the same for every
    half-step of these points, and stands in a graph once: exporters share it.

    Args:
        points: (B, H, N, D); products with the others are scores, in units of the temperature.
        others: (B, H, M, D).
        dual: (B, H, 1, M), float32 where points are in half precision; None for 0.
        live: (B, H, 1, M), 1 where one of the others takes part and 0 where it is masked; None for 1.
    """
    exact = torch.promote_types(points.dtype, torch.float32)
    # A mean over an axis that is not the last takes a runtime longer than a product with ones, on GPUs by far.
    taking_part = torch.ones_like(others[..., :1], dtype=exact).transpose(-1, -2) if live is None else live.to(exact)
    count = taking_part.sum(dim=-1, keepdim=True).clamp_min(1)
    centre = taking_part @ others.to(exact) / count
    dual = torch.zeros_like(taking_part) if dual is None else dual
    level = mean(dual, live) + torch.log(count)
    # Less the centre and the level, the last key, whose score is known, is 0.
    centred = (torch.cat([others.to(exact), centre], dim=-2) - centre).to(points.dtype)
    keys = with_dual(centred, pad(masked(dual - level, live), (0, 1)))
    others_are = torch.zeros_like(with_ones(others) if in_half(others) else others[..., :1])
    seen = attention(with_ones(points), keys, pad(others_are, (0, 0, 0, 1), value=MAX_COLUMN))[..., :1]
    share = (seen.to(exact).transpose(-1, -2) / MAX_COLUMN).clamp(MIN_SHARE, MAX_SHARE)
    return torch.log(share) - torch.log1p(-share) - level - centre @ points.to(exact).transpose(-1, -2)


def masked(dual: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """A dual (B, H, 1, M), with what leaves nothing to those that are masked."""
    return dual if live is None else dual * live + (1 - live) * MASKED_DUAL


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    dual: torch.Tensor | None,
    values: torch.Tensor,
    live: torch.Tensor | None = None,
) -> torch.Tensor:
    """The last half-step, on rows, and the product with values in one: softmax_j(q_i . k_j + dual_j) @ values.

    Of keys that are `live`, see `half_step`; 0 where none is.
    """
    if live is not None:
        given = torch.zeros_like(live) if dual is None else dual
        values = values * live.amax(dim=-1, keepdim=True).to(values.dtype)
        dual = masked(given - mean(given, live), live)
    elif dual is not None:
        dual = dual - dual.mean(dim=-1, keepdim=True)
    else:
        plain: torch.Tensor = attention(queries, keys, values)
        return plain
    biased = with_dual(keys, dual)
    # Kernels for half precision want the same number of channels everywhere.
    more = max(width(queries) - values.shape[-1], 0) if in_half(queries) else 0
    output: torch.Tensor = attention(with_ones(queries), biased, pad(values, (0, more)) if more else values)
    return output[..., : values.shape[-1]] if more else output
