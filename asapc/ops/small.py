"""Sinkhorn scaling of matrices that are small and many, as hyper-connections have one of 4 x 4 for each token."""

import torch

from asapc.ops.guarded import SUMMED, guarded_exponent, guarded_masses, total
from asapc.ops.sinkhorn import Sinkhorn, first_axis, other
from asapc.types.site import Axis, Guard


class SmallSinkhorn(Sinkhorn):
    """Exact scaling of a fixed number of half-steps, each matrix packed into one row of N * M numbers.

    A half-step is then one product of all matrices with a constant matrix, which sums along an axis and holds each sum
    at all its entries, and one division. Sums over four entries take runtimes ten times as long: each is a loop of its
    own.
    """

    def __init__(
        self,
        half_steps: int,
        last: Axis,
        size: tuple[int, int],
        guard: Guard | None = None,
        row_mass: torch.Tensor | None = None,
        column_mass: torch.Tensor | None = None,
    ) -> None:
        """Set up the loop for matrices of `size` (N, M); other arguments as of `GuardedSinkhorn`, None for no guard."""
        super().__init__(half_steps, last, row_mass, column_mass)
        self.guard, self.turned = guard, False
        n, m = size
        matrix = torch.ones(size, dtype=torch.float64)
        one, usual = matrix.new_ones(1), matrix.new_ones(1) * n / m
        self.factor: float | None = None
        if guard is None:  # a common factor of the axis that is not last cancels out
            rows = one if row_mass is None else row_mass.double()
            columns = usual if column_mass is None else column_mass.double()
        else:
            masses = guarded_masses(matrix, guard, last, row_mass, column_mass)
            rows, columns = masses["rows"], masses["columns"]
            factor = total(matrix, guard)
            self.factor = None if factor is None else factor.item()
        # Divided by masses, the sums need no multiplication by these.
        self.register("rows", torch.kron(torch.eye(n), torch.ones(m, m)), rows.expand(n).repeat_interleave(m))
        self.register("columns", torch.kron(torch.ones(n, n), torch.eye(m)), columns.expand(m).repeat(n))

    def register(self, axis: Axis, sums: torch.Tensor, mass: torch.Tensor) -> None:
        """Keep the (N * M, N * M) of zeros and ones that sums along an axis, and its constant, for masses (N * M,)."""
        floor = None if self.guard is None else self.guard.rows if axis == "rows" else self.guard.columns
        self.register_buffer(f"sums_of_{axis}", sums / mass, persistent=False)
        self.register_buffer(f"floor_of_{axis}", None if floor is None else floor.constant / mass, persistent=False)

    def forward(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E), or without values the plan (B, H, N, M); see `Sinkhorn.forward`."""
        plan = self.plan(scores).reshape(scores.shape)
        return plan if values is None else plan.to(values.dtype) @ values

    def plan(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the plan of scores (B, H, N, M), packed: (B * H, N * M)."""
        axis = first_axis(self.half_steps, self.last)
        if self.guard is None:
            exponent = scores - scores.amax(dim=SUMMED[axis], keepdim=True)
            # What is subtracted on the first axis cancels out in the first half-step. What is on the other one does in
            # the second; with it each row and column has an entry of 1, and no sum of all later half-steps is small.
            kernel = packed(torch.exp(exponent - exponent.amax(dim=SUMMED[other(axis)], keepdim=True)))
            first = packed(torch.exp(exponent))
        else:
            kernel = first = packed(torch.exp(guarded_exponent(scores, self.guard, axis)))
        plan, scaling = kernel, None
        for step in range(self.half_steps):
            if step > 0 or self.guard is None or self.guard.kernel != "softmax":
                if self.guard is not None and self.guard.divides == "masses":
                    plan = kernel if scaling is None else kernel * scaling
                divisors = self.divisors(first if step == 0 else plan, axis)
                plan, scaling = plan / divisors, 1 / divisors
            axis = other(axis)
        return plan if self.factor is None else plan * self.factor

    def divisors(self, plan: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Return by what a half-step divides packed matrices (B * H, N * M), at each entry."""
        sums, floor = self.get_buffer(f"sums_of_{axis}").to(plan), getattr(self, f"floor_of_{axis}")
        if floor is None:
            return plan @ sums
        clamped = getattr(self.guard, axis).clamped
        # One operation, not two: with few matrices their number is what takes the time.
        return torch.maximum(plan @ sums, floor.to(plan)) if clamped else torch.addmm(floor.to(plan), plan, sums)


def packed(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices (B, H, N, M) as (B * H, N * M)."""
    return matrices.flatten(2).flatten(0, 1)
