"""Sinkhorn scaling of matrices that are small and many, as hyper-connections have one of 4 x 4 for each token.

Sums over four entries take runtimes ten times as long as a product does: each is a loop of its own. Two layouts avoid
them. Packed, each matrix is one row of N * M numbers, and a half-step is one product of all matrices with a constant
matrix, which sums along an axis and holds each sum at all its entries, and one division. Interleaved, the same entry of
all matrices lies side by side, (N, M, matrices), and ones are multiplied from the left: more operations, each with less
to do.
"""

import torch

from asapc.ops.guarded import guarded_masses, total
from asapc.ops.sinkhorn import Sinkhorn, first_axis, other
from asapc.types.options import Lowering
from asapc.types.site import Axis, Guard


class SmallSinkhorn(Sinkhorn):
    """Exact scaling of a fixed number of half-steps, packed or, with the lowering "interleaved", interleaved."""

    def __init__(
        self,
        half_steps: int,
        last: Axis,
        size: tuple[int, int],
        guard: Guard | None = None,
        row_mass: torch.Tensor | None = None,
        column_mass: torch.Tensor | None = None,
        lowering: Lowering = "materialised",
    ) -> None:
        """Set up the loop for matrices of `size` (N, M); other arguments as of `GuardedSinkhorn`, None for no guard.

        Interleaved, all columns have one mass.
        """
        super().__init__(half_steps, last, row_mass, column_mass, lowering=lowering)
        self.guard, self.size, self.turned = guard, size, False
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
        eye_n, eye_m = torch.eye(n).double(), torch.eye(m).double()
        of_rows, of_columns = rows.expand(n).repeat_interleave(m), columns.expand(m).repeat(n)
        self.register("materialised", "rows", torch.kron(eye_n, matrix.new_ones(m, m)), of_rows)
        self.register("materialised", "columns", torch.kron(matrix.new_ones(n, n), eye_m), of_columns)
        if columns.numel() == 1:
            self.register("interleaved", "rows", matrix.new_ones(n, 1, m), rows.reshape(-1, 1, 1))
            self.register("interleaved", "columns", matrix.new_ones(1, n), columns)

    @property
    def interleaved(self) -> bool:
        """Whether the matrices are interleaved."""
        return self.lowering == "interleaved"

    def register(self, lowering: Lowering, axis: Axis, sums: torch.Tensor, mass: torch.Tensor) -> None:
        """Keep what matrices are multiplied with to be summed along an axis, and its constant, both over the masses.

        Divided by masses, the sums need no multiplication by these.
        """
        self.register_buffer(f"{lowering}_{axis}", sums / mass, persistent=False)
        floor = None if self.guard is None else self.guard.rows if axis == "rows" else self.guard.columns
        constant = None if floor is None else floor.constant / mass
        if constant is not None and bool((constant == constant.flatten()[0]).all()):
            constant = constant.flatten()[:1]  # a single number is added several times as fast as one for each entry
        self.register_buffer(f"{lowering}_{axis}_floor", constant, persistent=False)

    def forward(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return plan @ values (B, H, N, E), or without values the plan (B, H, N, M); see `Sinkhorn.forward`."""
        return self.result(scores.shape, *self.kernels(self.arrange(scores)), values)

    def from_kernel(
        self,
        kernel: torch.Tensor,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute what `forward` does from the exponentials of the scores, where these are the kernel."""
        arranged = self.arrange(kernel)
        return self.result(kernel.shape, arranged, arranged, values)

    def result(
        self, shape: torch.Size, kernel: torch.Tensor, first: torch.Tensor, values: torch.Tensor | None
    ) -> torch.Tensor:
        """Return what `forward` does for matrices of a shape (B, H, N, M), from what `kernels` gives."""
        if self.interleaved:
            plan = self.scale(kernel, first).flatten(0, 1).t().reshape(shape)
        else:
            packed = (matrices.reshape(-1, self.size[0] * self.size[1]) for matrices in (kernel, first))
            plan = self.scale(*packed).reshape(shape)
        return plan if values is None else plan.to(values.dtype) @ values

    def arrange(self, matrices: torch.Tensor) -> torch.Tensor:
        """Return matrices (B, H, N, M) as they are, or interleaved as (N, M, B * H)."""
        n, m = self.size
        return matrices.reshape(-1, n * m).t().reshape(n, m, -1) if self.interleaved else matrices

    def kernels(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kernel of arranged scores, and what the first half-step sums in its place."""
        rows, columns = (1, 0) if self.interleaved else (-1, -2)  # the dimensions that their sums go over
        one, two = (rows, columns) if first_axis(self.half_steps, self.last) == "rows" else (columns, rows)
        if self.guard is None:
            # What is subtracted on the first axis cancels out in the first half-step. What is on the other one does in
            # the second; with it each row and column has an entry of 1, and no sum of all later half-steps is small.
            exponent = scores - scores.amax(dim=one, keepdim=True)
            return torch.exp(exponent - exponent.amax(dim=two, keepdim=True)), torch.exp(exponent)
        if self.guard.kernel != "plain":
            scores = scores - scores.amax(dim=(one, two) if self.guard.kernel == "matrix" else one, keepdim=True)
        kernel = torch.exp(scores)
        if self.guard.kernel == "softmax":
            kernel = kernel / kernel.sum(dim=one, keepdim=True)
        return kernel, kernel

    def scale(self, kernel: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Take all half-steps from a kernel (B * H, N * M) or (N, M, B * H), and return the plan alike."""
        axis = first_axis(self.half_steps, self.last)
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
        """Return by what a half-step divides a plan as of `scale`, in a shape that broadcasts to its own."""
        floor = getattr(self, f"{self.lowering}_{axis}_floor")
        if floor is None:
            return self.sums(plan, axis)
        if getattr(self.guard, axis).clamped:
            return torch.maximum(self.sums(plan, axis), floor.to(plan))
        return self.sums(plan, axis, floor.to(plan))

    def sums(self, plan: torch.Tensor, axis: Axis, constant: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sums of a plan as of `scale` along an axis, over their masses, plus a constant."""
        sums = self.get_buffer(f"{self.lowering}_{axis}").to(plan)
        if self.interleaved and axis == "rows":
            of_rows = torch.bmm(sums, plan)
            return of_rows if constant is None else of_rows + constant
        one, two = (sums, plan.flatten(1)) if self.interleaved else (plan, sums)
        # One operation, not two: with few matrices their number is what takes the time.
        product = one @ two if constant is None else torch.addmm(constant, one, two)
        return product.reshape(1, self.size[1], -1) if self.interleaved else product
