"""Exact Sinkhorn attention that never holds the scores, in Triton: the strongest rival on a GPU.

A half-step is a log-sum-exp over a row of scores, taken block by block as FlashAttention (arXiv 2205.14135) takes its
softmax: each block of queries reads all keys once and keeps a maximum and a sum. The last one multiplies with the
values on the way. Memory is linear in the length; every half-step computes the scores anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [
    triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
    for rows, columns, warps in ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 32, 4))
]


@triton.jit
def pass_over(
    points,  # noqa: ANN001
    others,  # noqa: ANN001
    dual,  # noqa: ANN001
    values,  # noqa: ANN001
    out,  # noqa: ANN001
    scale,  # noqa: ANN001
    n,  # noqa: ANN001
    m,  # noqa: ANN001
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ATTEND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write -logsumexp_j(scale points_i . others_j + dual_j), or with ATTEND that softmax times the values."""
    matrix = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, CHANNELS)
    place = (matrix * n + rows[:, None]) * CHANNELS + channels[None, :]
    left = tl.load(points + place, mask=rows[:, None] < n, other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, m, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < m
        across = (matrix * m + columns[None, :]) * CHANNELS + channels[:, None]
        right = tl.load(others + across, mask=inside[None, :], other=0.0)
        bias = tl.load(dual + matrix * m + columns, mask=inside, other=float("-inf"))
        scores = tl.dot(left, right, input_precision=PRECISION) * scale + bias[None, :]
        top = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - top[:, None])
        shrink = tl.exp(largest - top)
        total = total * shrink + tl.sum(weights, 1)
        largest = top
        if ATTEND:
            down = (matrix * m + columns[:, None]) * CHANNELS + channels[None, :]
            block = tl.load(values + down, mask=inside[:, None], other=0.0)
            product = product * shrink[:, None] + tl.dot(weights.to(block.dtype), block, input_precision=PRECISION)
    if ATTEND:
        tl.store(out + place, (product / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < n)
    else:
        tl.store(out + matrix * n + rows, -(largest + tl.log(total)), mask=rows < n)


tuned = triton.autotune(CONFIGS, key=["n", "m", "ATTEND", "PRECISION"])(pass_over)


def sinkhorn_attention(q: Tensor, k: Tensor, v: Tensor, half_steps: int, scale: float, blocks: int = 0) -> Tensor:
    """Return plan @ values (B, H, N, D) of a loop that ends on rows.

    Args:
        q: (B, H, N, D), D a power of two of at least 16.
        k: (B, H, M, D).
        v: (B, H, M, D).
        half_steps: of the loop.
        scale: of the scores.
        blocks: rows and columns of a block; 0 tries some and takes the fastest, which needs a GPU.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    sides = (q, k)
    duals = [torch.zeros(side.shape[:-1], dtype=torch.float32, device=q.device) for side in sides]
    # In float32 without TF32, as all other forms.
    common = {"CHANNELS": q.shape[-1], "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32"}
    kernel = pass_over if blocks else tuned
    fixed = {"ROWS": blocks, "COLUMNS": blocks} if blocks else {}

    def run(rows: int, values: Tensor, out: Tensor, attend: bool) -> Tensor:
        points, others, dual = sides[rows], sides[1 - rows], duals[1 - rows]
        n, m = points.shape[-2], others.shape[-2]

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(n, meta["ROWS"]), q.shape[0] * q.shape[1]

        kernel[grid](points, others, dual, values, out, scale, n, m, ATTEND=attend, **common, **fixed)
        return out

    for step in range(half_steps - 1):
        side = (half_steps - 1 - step) % 2  # the last of these is on keys, the one after it on queries
        duals[side] = run(side, v, torch.empty_like(duals[side]), attend=False)
    return run(0, v, torch.empty_like(q), attend=True)
