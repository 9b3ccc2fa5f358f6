"""Sinkhorn scaling itself: the float64 reference, and the fastest exact form with its truncations."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from asapc.ops.c_transform import column_step, plan, row_step
from asapc.ops.fused import attend, half_step
from asapc.ops.scaling import (
    MIN_LIVE,
    MIN_SUM,
    column_scaling,
    log_row_softmax,
    log_scaled,
    row_scaling,
    scaled_plan,
    scaling_exponent,
    start,
)
from asapc.types.options import Lowering
from asapc.types.site import Axis

# Half-steps after which a wide kernel takes up the scaling vectors (Schmitzer 2019, "Stabilized sparse scaling
# algorithms", section 3.2): in the end these leave the range of float32, and of float64 too, of sharp scores after 30.
MAX_STEPS = 20
# Like `scaling.MAX_SPREAD`, but for float64 and scaling vectors too: their products stay within its range of 745.
MAX_SPREAD_FLOAT64 = 200.0
# Least sums of rows and columns of a kernel below which its entries, from 1e-308 on, could have lost what counts.
MIN_SUMS_FLOAT64 = 1e-200, 1e-80


def other(axis: Axis) -> Axis:
    """Return the other axis."""
    return "columns" if axis == "rows" else "rows"


def first_axis(half_steps: int, last: Axis) -> Axis:
    """Return the axis that the first of `half_steps` alternating half-steps normalises."""
    return last if half_steps % 2 else other(last)


def sinkhorn_iterates(
    scores: torch.Tensor,
    first: Axis,
    row_mass: torch.Tensor | None = None,
    column_mass: torch.Tensor | None = None,
) -> Iterator[tuple[Axis, torch.Tensor, torch.Tensor]]:
    """Take half-steps in the log domain without end, and yield (axis just normalised, f, g) after each.

    Args:
        scores: (B, H, N, M), -inf where masked; the computation keeps its dtype.
        first: the axis that the first half-step normalises.
        row_mass: (1,) or (N,), what rows are normalised to; None for 1.
        column_mass: (1,) or (M,), what columns are normalised to; None for N / M.
    """
    f, g = torch.zeros_like(scores[..., 0]), torch.zeros_like(scores[..., 0, :])
    axis = first
    while True:
        if axis == "rows":
            f = row_step(scores, g, row_mass)
        else:
            g = column_step(scores, f, column_mass)
        yield axis, f, g
        axis = other(axis)


def sinkhorn_duals(
    scores: torch.Tensor,
    half_steps: int,
    last: Axis = "rows",
    row_mass: torch.Tensor | None = None,
    column_mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f (B, H, N) and g (B, H, M) after `half_steps` >= 1 half-steps from zero; see `sinkhorn_iterates`."""
    iterates = sinkhorn_iterates(scores, first_axis(half_steps, last), row_mass, column_mass)
    _, f, g = next(islice(iterates, half_steps - 1, None))
    return f, g


def scaled_duals(
    scores: torch.Tensor,
    half_steps: int,
    last: Axis = "rows",
    row_mass: torch.Tensor | None = None,
    column_mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `sinkhorn_duals` does, ten times as fast in float64: one matrix-vector product a half-step.

    Where entries that underflow in the kernel could count, or where there are masks, it falls back to `sinkhorn_duals`.
    """
    turned = first_axis(half_steps, last) == "columns"
    oriented = scores.transpose(-1, -2) if turned else scores
    largest = oriented.amax(dim=-1, keepdim=True)
    kernel = torch.exp(oriented - largest)
    rows = scores.new_ones(1) if row_mass is None else row_mass
    columns = scores.new_full((1,), scores.shape[-2] / scores.shape[-1]) if column_mass is None else column_mass
    of_rows, of_columns = (columns, rows) if turned else (rows, columns)  # of the kernel
    u, v = kernel.new_ones(1, oriented.shape[-2]), kernel.new_ones(1, oriented.shape[-1])
    for step in range(half_steps):
        if step % 2:
            v = of_columns / (u @ kernel)
        else:
            u = of_rows / (v @ kernel.transpose(-1, -2))
    f, g = torch.log(u) - largest.transpose(-1, -2), torch.log(v)
    spread = torch.stack([x.amax() - x.amin() for x in (torch.log(u), g, torch.log(kernel.amax(dim=-2)))]).amax()
    if scores.dtype != torch.float64 or not bool(spread < MAX_SPREAD_FLOAT64):  # nor where it is NaN, as with masks
        return sinkhorn_duals(scores, half_steps, last, row_mass, column_mass)
    f, g = f.squeeze(-2), g.squeeze(-2)
    return (g.expand(scores.shape[:-1]), f) if turned else (f, g.expand_as(scores[..., 0, :]))


def scaled_closures(scores: torch.Tensor, duals: torch.Tensor, row_mass: torch.Tensor | None = None) -> torch.Tensor:
    """Take two half-steps from several estimates of the columns' dual at once: rows to their masses, then columns to 1.

    All are products with one kernel. Where these leave the range of float64 it falls back to the log domain.

    Args:
        scores: (B, H, N, M), -inf where masked, float64.
        duals: (B, H, S, M), S estimates.
        row_mass: (1,) or (N,), what rows are normalised to; None for 1.

    Returns:
        (B, H, S, M), 0 for columns that are wholly masked.
    """
    largest = scores.amax(dim=-1, keepdim=True)
    kernel = torch.exp(scores - largest.clamp_min(torch.finfo(scores.dtype).min))  # masked rows stay -inf
    live_rows = (largest > -torch.inf).transpose(-1, -2)
    live_columns = scores.amax(dim=-2, keepdim=True) > -torch.inf  # which a kernel that underflows does not show
    shift = torch.where(live_columns, duals, -torch.inf).amax(dim=-1, keepdim=True)
    sums = torch.where(live_columns, torch.exp(duals - shift), 0.0) @ kernel.transpose(-1, -2)
    ones = scores.new_ones(1)
    of_rows = ones if row_mass is None else row_mass
    of_columns = torch.where(live_rows, of_rows / sums, 0.0) @ kernel
    least = torch.where(live_rows, sums, 1.0).amin(), torch.where(live_columns, of_columns, 1.0).amin()
    # What underflowed in the kernel, or beside it, is far below such sums. NaN compares as false.
    if bool(least[0] > MIN_SUMS_FLOAT64[0]) and bool(least[1] > MIN_SUMS_FLOAT64[1]):
        return torch.where(live_columns, shift - torch.log(of_columns), 0.0)
    return torch.stack([column_step(scores, row_step(scores, d, of_rows), ones) for d in duals.unbind(dim=-2)], dim=-2)


def sinkhorn_plan_ref(
    scores: torch.Tensor,
    half_steps: int,
    last: Axis = "rows",
    row_mass: torch.Tensor | None = None,
    column_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the float64 reference of `Sinkhorn`'s plan (B, H, N, M): the log-domain loop of its definition."""
    scores = scores.double()
    return plan(scores, *sinkhorn_duals(scores, half_steps, last, row_mass, column_mass))


def times(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Multiply two scaling vectors, None for 1."""
    if one is None or other is None:
        return one if other is None else other
    return one * other


def kernel_spread(scores: torch.Tensor) -> float:
    """Measure how far the largest entries of a kernel's columns lie below 1, whichever axis is first; see `MAX_SPREAD`.

    Args:
        scores: (B, H, N, M), -inf where masked; where any is NaN, so is the spread.
    """
    spreads = [scores.new_zeros(1)]
    for oriented in (scores, scores.transpose(-1, -2)):
        sums = oriented.logsumexp(dim=-1, keepdim=True)
        largest = torch.where(sums == -torch.inf, -torch.inf, oriented - sums).amax(dim=-2)  # no wholly masked rows
        spreads.append(-largest[largest != -torch.inf])  # nor columns
    largest_spread: float = torch.cat(spreads).amax().item()  # NaN where any is, unlike Python's max
    return largest_spread


class Sinkhorn(nn.Module):
    """Exact Sinkhorn scaling of a fixed number of half-steps, in scaling form.

    It takes one exp of the scores, then one matrix-vector product a half-step, where the log-domain loop takes an exp
    and a log of all N x M entries each time. With fewer half-steps than the teacher it is truncated Sinkhorn, with one
    half-step on rows softmax. In float32 it is within about 1e-5 relative of the float64 reference, as long as the
    range of the duals permits (`scaling.py`).
    """

    def __init__(
        self,
        half_steps: int,
        last: Axis = "rows",
        row_mass: torch.Tensor | None = None,
        column_mass: torch.Tensor | None = None,
        masked: bool = False,
        logarithm: bool = False,
        wide: bool = False,
        lowering: Lowering = "materialised",
    ) -> None:
        """Set up the loop.

        Args:
            half_steps: at least 1.
            last: the axis that the last half-step normalises.
            row_mass: (1,) or (N,), what rows are normalised to; None for 1.
            column_mass: (1,) or (M,), what columns are normalised to; None for N / M.
            masked: whether scores below `scaling.MIN_LIVE` are excluded.
            logarithm: whether the plan is returned as its logarithm.
            wide: whether the scores spread so far, see `scaling.MAX_SPREAD`, that the kernel has to be levelled on
                both axes. That takes more passes over the scores.
            lowering: the form that it takes in a graph, `forward` or `from_points`.
        """
        super().__init__()
        if half_steps < 1:
            raise ValueError(f"half_steps must be at least 1, got {half_steps}")
        self.half_steps, self.last = half_steps, last
        self.turned = first_axis(half_steps, last) == "columns"
        self.masked, self.logarithm, self.wide, self.lowering = masked, logarithm, wide, lowering
        self.register_buffer("row_mass", row_mass)
        self.register_buffer("column_mass", column_mass)

    row_mass: torch.Tensor | None
    column_mass: torch.Tensor | None

    def masses(self, kernel: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the masses of the kernel's rows (B, H, 1, rows) and columns (B, H, 1, columns); None for 1.

        On the axis that is not last a factor changes nothing. It is chosen so that both axes have the same total mass:
        otherwise the scaling vectors would diverge with every repetition, out of the range of float32.
        """
        n, m = kernel.shape[-2:][:: -1 if self.turned else 1]
        # Dynamic lengths are compared only as far as they are known to be equal.
        default = None if statically_known_true(n == m) else kernel.new_full((1,), 1.0) * n / m
        masses = (self.row_mass, default if self.column_mass is None else self.column_mass)
        rows, columns = (
            None if mass is None else mass.expand(size).unsqueeze(0)
            for mass, size in zip(masses[:: -1 if self.turned else 1], kernel.shape[-2:], strict=True)
        )
        uniform = self.row_mass is None and self.column_mass is None
        if self.half_steps <= 2 or (uniform and not self.masked):
            return rows, columns
        return self.balance(kernel, rows, columns)

    def balance(
        self, kernel: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale the masses of the axis that is not last, so that both axes have the same total over what is live."""
        live_rows, live_columns = (kernel.new_ones(1, size) for size in kernel.shape[-2:])
        rows, columns = live_rows if rows is None else rows, live_columns if columns is None else columns
        if self.masked:
            live_rows = (kernel.amax(dim=-1, keepdim=True) > 0).to(kernel.dtype).transpose(-1, -2)
            live_columns = (kernel.amax(dim=-2, keepdim=True) > 0).to(kernel.dtype)
        total_rows, total_columns = (
            (mass * live).sum(dim=-1, keepdim=True).clamp_min(MIN_SUM)
            for mass, live in ((rows, live_rows), (columns, live_columns))
        )
        if (self.last == "rows") != self.turned:  # the kernel's rows come last
            return rows, columns * (total_rows / total_columns)
        return rows * (total_columns / total_rows), columns

    def forward(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E), or without values the plan (B, H, N, M).

        Args:
            scores: (B, H, N, M), in units of the temperature.
            queries: not needed; all operators are called alike.
            keys: not needed either.
            values: (B, H, M, E).
        """
        if self.turned:
            return self.oriented(scores.transpose(-1, -2), queries, keys, values, fused=False)
        return self.oriented(scores, queries, keys, values)

    def oriented(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor | None,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        fused: bool = True,
    ) -> torch.Tensor:
        """Compute what `forward` does, with scores (B, H, M, N) where the operator is `turned`; see `scaling.start`."""
        exponent = log_row_softmax(scores, self.masked) if self.logarithm or self.wide else None
        kernel, u = start(scores, self.masked, fused) if exponent is None else (torch.exp(exponent), None)
        rows, columns = self.masses(kernel)
        u = times(u, rows)
        if self.wide and exponent is not None and self.half_steps > 1:
            exponent, shift = scaling_exponent(exponent, self.masked)
            kernel, u = torch.exp(exponent), times(u, torch.exp(shift))
            if self.masked:  # the vectors of masked rows and columns grow without end
                exponent = torch.where(scores >= MIN_LIVE, exponent, -torch.inf)
        v: torch.Tensor | None = None
        for step in range(1, self.half_steps):
            if self.wide and exponent is not None and step % MAX_STEPS == 0:
                exponent = log_scaled(exponent, u, v)
                kernel, u, v = torch.exp(exponent), None, None
            if step % 2:
                v = times(column_scaling(kernel, u), columns)
            else:
                u = times(row_scaling(kernel, v), rows)
        if self.logarithm and exponent is not None:
            log_plan = log_scaled(exponent, u, v)
            return log_plan.transpose(-1, -2) if self.turned else log_plan
        return scaled_plan(kernel, u, v, values, self.turned)

    def from_points(
        self,
        scaled: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        live: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E) in fused passes (`fused.py`), for an end on rows.

        Args:
            scaled: (B, H, N, D), queries whose products with the keys are scores in units of the temperature.
            queries: not needed; all operators are called alike.
            keys: (B, H, M, D).
            values: (B, H, M, E).
            live: (B, H, 1, M), 1 for a key that takes part and 0 for one that is masked; None for 1.
        """
        dual: torch.Tensor | None = None
        rows, columns = (scaled, None, self.row_mass), (keys, live, self.column_mass)
        one, other = (columns, rows) if self.turned else (rows, columns)
        for _ in range(self.half_steps - 1):
            dual = half_step(one[0], other[0], dual, other[1], one[2])
            one, other = other, one
        return attend(scaled, keys, dual, values, live, self.row_mass)
