"""Sinkhorn scaling on the exponentiated scores: one exp, then matrix-vector products.

The kernel is exp(scores) up to a factor per row and a factor per column. A factor is a dual, so it changes no plan; it
keeps the kernel in the range of float32. A loop that starts with rows has softmax(scores) as its kernel, which is its
first half-step and fused in every runtime. A loop that starts with columns is transposed, so that it starts with rows.
Scaling vectors are row vectors, (B, H, 1, N) and (B, H, 1, M): runtimes multiply a row vector with a matrix fast.
"""

import torch

# Sums are clamped to at least this. Float32 reaches it only when the scaling vectors span more than 30 orders of
# magnitude; the result is then wrong but finite, and the fidelity check on real samples sees it.
MIN_SUM = 1e-30
# How far, as a natural logarithm, the largest entries of the softmax's columns may lie below 1 before the kernel has to
# be levelled: half the range of float32, so that entries much smaller than those still count.
MAX_SPREAD = 40.0
# Where a site is masked, scores below this are the mask: -inf, -1e9, -1e4 and their likes.
MIN_LIVE = -1e3


def subtract_largest(scores: torch.Tensor, dim: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Subtract the largest scores along an axis, and return these too; masked scores stay below MIN_LIVE or near it."""
    largest = scores.amax(dim=dim, keepdim=True)
    largest = largest.clamp_min(MIN_LIVE) if masked else largest
    return scores - largest, largest


def scaling_exponent(scores: torch.Tensor, masked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exponent of a kernel with a 1 in every row and column that is not masked, for a first step on columns.

    Args:
        scores: (B, H, N, M), with any query-side dual already added.
        masked: whether to exclude scores below MIN_LIVE: their kernel is 0, even for a whole row or column.

    Returns:
        exponent (B, H, N, M), not positive, and shift (B, H, 1, N), so that, up to a factor per column,
        exp(scores) = exp(shift) * exp(exponent). A further query-side dual f is
        therefore exp(f + shift) as a scaling vector of the kernel exp(exponent).
    """
    exponent, shift = subtract_largest(subtract_largest(scores, -2, masked)[0], -1, masked)
    return exponent, shift.transpose(-1, -2)


def log_row_softmax(scores: torch.Tensor, masked: bool = False) -> torch.Tensor:
    """Return the log-softmax over the last axis; with `masked` it excludes scores below MIN_LIVE, even whole rows."""
    if not masked:
        return torch.log_softmax(scores, dim=-1)
    scores, _ = subtract_largest(scores, -1, masked)
    return scores - torch.log(torch.exp(scores).sum(dim=-1, keepdim=True).clamp_min(MIN_SUM))


def start(scores: torch.Tensor, masked: bool, fused: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a kernel and the scaling vector with which its rows sum to 1, None for 1.

    Args:
        scores: (B, H, N, M).
        masked: whether scores below MIN_LIVE get 0, even whole rows.
        fused: whether softmax is the fastest way. It is not where the scores had to be transposed first: runtimes then
            compute a slow softmax over the other axis.

    Returns:
        kernel (B, H, N, M), between 0 and 1, and the vector (B, H, 1, N).
    """
    if fused and not masked:
        return torch.softmax(scores, dim=-1), None
    kernel = torch.exp(subtract_largest(scores, -1, masked)[0])
    return kernel, row_scaling(kernel, None)


def column_sums(kernel: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
    """Return the sums (B, H, 1, M) of the columns of u * kernel."""
    return (kernel.new_ones(1, kernel.shape[-2]) if u is None else u) @ kernel


def column_scaling(kernel: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
    """Return the vector v (B, H, 1, M), up to a constant, with which the columns of u * kernel * v have equal sums."""
    sums = column_sums(kernel, u).clamp_min(MIN_SUM)
    if torch.compiler.is_exporting() or not sums.requires_grad:
        return 1 / sums
    # Gradients of 1 / x go by its square, which leaves the range of float32 from 1e-19 on.
    near = (1 / sums).detach()
    return near / (near * sums)


def row_scaling(kernel: torch.Tensor, v: torch.Tensor | None) -> torch.Tensor:
    """Return the vector u (B, H, 1, N) with which the rows of u * kernel * v sum to 1."""
    return column_scaling(kernel.transpose(-1, -2), v)


def log_scaled(exponent: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None) -> torch.Tensor:
    """Return the logarithm (B, H, N, M) of u * exp(exponent) * v; see `scaled_plan`."""
    if u is not None:
        exponent = exponent + torch.log(u).transpose(-1, -2)
    return exponent if v is None else exponent + torch.log(v)


def scaled_plan(
    kernel: torch.Tensor,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    values: torch.Tensor | None,
    turned: bool,
) -> torch.Tensor:
    """Return the plan u * kernel * v, or its product with values.

    Args:
        kernel: (B, H, N, M), or (B, H, M, N) with `turned`.
        u: scaling vector of the kernel's rows, broadcast to (B, H, 1, rows); None for 1.
        v: scaling vector of its columns, broadcast to (B, H, 1, columns); None for 1.
        values: (B, H, M, E), or None.
        turned: whether the kernel is the transpose of the plan's.

    Returns:
        (B, H, N, E) in the dtype of the values, or without values (B, H, N, M) in that of the kernel.
    """
    if values is not None and values.dtype != kernel.dtype:
        if u is None and v is None:
            plan = kernel.transpose(-1, -2) if turned else kernel
            return plan.to(values.dtype) @ values
        # Scaling vectors exceed the range of half precision, and scaling the matrix instead takes more passes over it
        # than the faster product saves.
        return scaled_plan(kernel, u, v, values.to(kernel.dtype), turned).to(values.dtype)
    if turned:
        kernel, u, v = kernel.transpose(-1, -2), v, u
    right = values
    if v is not None:
        right = v if values is None else v.transpose(-1, -2) * values
    if right is None:
        product = kernel
    else:
        product = kernel * right if values is None else kernel @ right
    return product if u is None else u.transpose(-1, -2) * product
