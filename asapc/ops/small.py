"""Sinkhorn scaling of matrices that are small and many, as hyper-connections have one of 4 x 4 for each token."""

import torch

from asapc.ops.guarded import guarded_exponent, guarded_masses, scale_by_turns, total
from asapc.ops.sinkhorn import Sinkhorn, first_axis, other
from asapc.types.site import Axis, Guard

# Half-steps that are taken in the log domain: after one on each axis no sum of a small matrix is small.
LOGARITHMIC = 2
# Of (N, M, B * H): the dimension that the sums of rows, and of columns, go over.
SUMMED: dict[Axis, int] = {"rows": 1, "columns": 0}


def last_alike(matrices: torch.Tensor) -> torch.Tensor:
    """Return (B, H, N, M) as (N, M, B * H)."""
    # In one axis, not two: ONNX Runtime pushes a mere transposition through the whole loop until it is gone.
    return matrices.permute(2, 3, 0, 1).flatten(2)


class SmallSinkhorn(Sinkhorn):
    """Exact scaling of a fixed number of half-steps, samples and heads last.

    A half-step is then a few operations on long vectors. Sums over four entries that lie side by side, or products with
    matrices of four, take runtimes ten times as long.
    """

    def __init__(
        self,
        half_steps: int,
        last: Axis,
        guard: Guard | None = None,
        row_mass: torch.Tensor | None = None,
        column_mass: torch.Tensor | None = None,
    ) -> None:
        """Set up the loop; arguments as of `GuardedSinkhorn`, None for no guard."""
        super().__init__(half_steps, last, row_mass, column_mass)
        self.guard, self.turned = guard, False

    def forward(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E), or without values the plan (B, H, N, M); see `Sinkhorn.forward`."""
        plan = self.plan(scores)
        plan = plan.reshape(*plan.shape[:2], *scores.shape[:2]).permute(2, 3, 0, 1)
        return plan if values is None else plan.to(values.dtype) @ values

    def plan(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the plan (N, M, B * H)."""
        axis = first_axis(self.half_steps, self.last)
        if self.guard is None:
            return self.plain_plan(last_alike(scores), axis)
        kernel = torch.exp(guarded_exponent(scores, self.guard, axis))
        masses = guarded_masses(kernel, self.guard, self.last, self.row_mass, self.column_mass)
        of_rows, of_columns = masses["rows"].reshape(-1, 1, 1), masses["columns"].reshape(1, -1, 1)
        shaped: dict[Axis, torch.Tensor] = {"rows": of_rows, "columns": of_columns}
        plan = scale_by_turns(last_alike(kernel), self.half_steps, axis, self.guard, shaped, SUMMED)
        factor = total(kernel, self.guard)
        return plan if factor is None else plan * factor

    def plain_plan(self, scores: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Return the plan of a loop without a guard, from scores (N, M, B * H) and the first axis."""
        n, m = scores.shape[:2]
        masses: dict[Axis, torch.Tensor | None] = {
            "rows": None if self.row_mass is None else self.row_mass.reshape(-1, 1, 1),
            "columns": None if self.column_mass is None else self.column_mass.reshape(1, -1, 1),
        }
        log_plan = scores
        for _ in range(min(LOGARITHMIC, self.half_steps)):
            log_plan = log_plan - torch.logsumexp(log_plan, dim=SUMMED[axis], keepdim=True)
            mass = masses[axis]
            log_plan = log_plan if mass is None else log_plan + torch.log(mass)
            axis = other(axis)
        plan = torch.exp(log_plan)
        for _ in range(LOGARITHMIC, self.half_steps):
            plan = plan / plan.sum(dim=SUMMED[axis], keepdim=True)
            mass = masses[axis]
            plan = plan if mass is None else plan * mass
            axis = other(axis)
        return plan * (n / m) if self.last == "columns" and self.column_mass is None else plan
