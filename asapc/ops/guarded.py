"""Sinkhorn loops with a guard, constants that keep their divisors from zero: common in code, rare in papers.

A guard acts where sums are as small as its constants: on sharp scores. The plan is still u * kernel * v, so that the
scaling form holds. A half-step may divide the plan by its own sums, or masses by the sums of the kernel scaled on the
other axis. With a guard the two differ: in the first the new u depends on the one before.
"""

from collections.abc import Mapping
from typing import Any

import torch

from asapc.ops.scaling import column_sums, log_scaled, scaled_plan
from asapc.ops.sinkhorn import Sinkhorn, first_axis, other
from asapc.types.site import Axis, Guard

# Limit of scaling vectors as a share of the largest float, since they are multiplied with values. Where a column is all
# zeros, each half-step divides its vector by the constant once more.
MAX_VECTOR = 1e-6
SUMMED: Mapping[Axis, int] = {"rows": -1, "columns": -2}  # the dimension that the sums of an axis go over


class GuardedSinkhorn(Sinkhorn):
    """Exact Sinkhorn scaling of a fixed number of half-steps with a guard, in scaling form, on materialised scores."""

    def __init__(self, half_steps: int, last: Axis, guard: Guard, **options: Any) -> None:
        """Set up the loop.

        Args:
            half_steps: as of `Sinkhorn`.
            last: the same.
            guard: the constants, and where they stand.
            options: masses and `logarithm` of `Sinkhorn`.
        """
        super().__init__(half_steps, last, **options)
        self.guard = guard
        self.turned = False  # no transposed form: both axes' sums are products with the kernel as it lies

    def forward(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E), or without values the plan (B, H, N, M); see `Sinkhorn.forward`."""
        exponent = guarded_exponent(scores, self.guard, self.first)
        kernel = torch.exp(exponent)
        vectors = self.scaling_vectors(kernel)
        factor = total(kernel, self.guard)
        u, v = vectors["rows"], vectors["columns"]
        if factor is not None:
            u = factor.unsqueeze(0) if u is None else u * factor
        if self.logarithm:
            return log_scaled(exponent, u, v)
        return scaled_plan(kernel, u, v, values, turned=False)

    @property
    def first(self) -> Axis:
        """The axis that the first half-step normalises."""
        return first_axis(self.half_steps, self.last)

    def scaling_vectors(self, kernel: torch.Tensor) -> dict[Axis, torch.Tensor | None]:
        """Return the vectors (B, H, 1, N) of rows and (B, H, 1, M) of columns after all half-steps; None for 1."""
        masses = guarded_masses(kernel, self.guard, self.last, self.row_mass, self.column_mass)
        matrix = {"rows": kernel.transpose(-1, -2), "columns": kernel}
        vectors: dict[Axis, torch.Tensor | None] = {"rows": None, "columns": None}
        axis = self.first
        for step in range(self.half_steps):
            if step > 0 or self.guard.kernel != "softmax":
                sums, own = column_sums(matrix[axis], vectors[other(axis)]), vectors[axis]
                if self.guard.divides == "plan" and own is not None:
                    vector = own * masses[axis] / guarded(own * sums, axis, self.guard)
                else:
                    vector = masses[axis] / guarded(sums, axis, self.guard)
                vectors[axis] = vector.clamp_max(MAX_VECTOR * torch.finfo(vector.dtype).max)
            axis = other(axis)
        return vectors


def guarded_plan_ref(
    scores: torch.Tensor,
    half_steps: int,
    last: Axis,
    guard: Guard,
    row_mass: torch.Tensor | None = None,
    column_mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the float64 reference of `GuardedSinkhorn`'s plan (B, H, N, M), half-step by half-step on matrices.

    Args:
        scores: (B, H, N, M), -inf where masked.
        half_steps: of the loop, the softmax that its kernel may be included.
        last: the axis that the last one normalises.
        guard: the constants.
        row_mass: (1,) or (N,), the sums of the plan's rows if they are last; None for 1.
        column_mass: (1,) or (M,), those of its columns; None for N / M.
    """
    axis = first_axis(half_steps, last)
    kernel = torch.exp(guarded_exponent(scores.double(), guard, axis))
    masses = guarded_masses(kernel, guard, last, row_mass, column_mass)
    factor = total(kernel, guard)
    of_rows = masses["rows"].unsqueeze(-1)
    plan = scale_by_turns(kernel, half_steps, axis, guard, {"rows": of_rows, "columns": masses["columns"]}, SUMMED)
    return plan if factor is None else plan * factor


def scale_by_turns(
    kernel: torch.Tensor,
    half_steps: int,
    first: Axis,
    guard: Guard,
    masses: Mapping[Axis, torch.Tensor],
    summed: Mapping[Axis, int],
) -> torch.Tensor:
    """Return what half-steps on the matrix itself make of a kernel; `summed` says over which dimension sums go."""
    plan, axis = kernel, first
    vectors: dict[Axis, torch.Tensor] = {}
    for step in range(half_steps):
        if step > 0 or guard.kernel != "softmax":
            scaled = plan if guard.divides == "plan" else kernel * vectors.get(other(axis), 1.0)
            vectors[axis] = masses[axis] / guarded(scaled.sum(dim=summed[axis], keepdim=True), axis, guard)
            plan = scaled * vectors[axis]
        axis = other(axis)
    return plan


def guarded(sums: torch.Tensor, axis: Axis, guard: Guard) -> torch.Tensor:
    """Return the divisors that a guard makes of the sums of an axis."""
    floor = guard.rows if axis == "rows" else guard.columns
    if floor is None:
        return sums
    return sums.clamp_min(floor.constant) if floor.clamped else sums + floor.constant


def guarded_exponent(scores: torch.Tensor, guard: Guard, first: Axis) -> torch.Tensor:
    """Return the logarithm of the kernel (B, H, N, M)."""
    dim = -1 if first == "rows" else -2
    if guard.kernel == "softmax":
        return torch.log_softmax(scores, dim)
    if guard.kernel == "plain":
        return scores
    return scores - scores.amax(dim=dim if guard.kernel == "first" else (-2, -1), keepdim=True)


def guarded_masses(
    kernel: torch.Tensor,
    guard: Guard,
    last: Axis,
    row_mass: torch.Tensor | None,
    column_mass: torch.Tensor | None,
) -> dict[Axis, torch.Tensor]:
    """Return what rows and columns are scaled to within the loop, broadcast to (N,) and (M,)."""
    n, m = kernel.shape[-2:]
    one = kernel.new_ones(1)
    rows = one if row_mass is None else row_mass.to(kernel)
    columns = one * n / m if column_mass is None else column_mass.to(kernel)
    masses: dict[Axis, torch.Tensor] = {"rows": rows, "columns": columns}
    factor = total(kernel, guard)
    if factor is not None:
        masses = {axis: mass / factor for axis, mass in masses.items()}
    if guard.other_mass == "one":
        masses[other(last)] = one
    else:
        of_rows, of_columns = masses["rows"].mean() * n, masses["columns"].mean() * m
        of_last, of_other = (of_rows, of_columns) if last == "rows" else (of_columns, of_rows)
        masses[other(last)] = masses[other(last)] * (of_last / of_other)
    return masses


def total(kernel: torch.Tensor, guard: Guard) -> torch.Tensor | None:
    """Return by what the plan is multiplied after the loop, a size of the kernel as (1,); None for 1."""
    if guard.total == "same":
        return None
    return kernel.new_ones(1) * kernel.shape[-2 if guard.total == "rows" else -1]
