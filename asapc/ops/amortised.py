"""Sinkhorn scaling of small matrices from an estimate of one dual, which a ReLU network makes of a matrix's own scores.

Where scores spread far, half-steps forget their start slowly. From a start near the end, few are enough.
"""

from dataclasses import replace

import torch

from asapc.ops.sinkhorn import other
from asapc.ops.small import SmallSinkhorn
from asapc.types.choices import AmortisedParams
from asapc.types.options import Lowering
from asapc.types.site import Axis, Guard

# Exponents are kept within this, and sums within the range of float32, also where scores that the network was not
# trained on mislead it. Entries of a plan below e^-60 are zero in float32 all the same.
MAX_EXPONENT = 60.0


class AmortisedSinkhorn(SmallSinkhorn):
    """A network, then few half-steps: packed or, with the lowering "interleaved", interleaved."""

    def __init__(
        self,
        params: AmortisedParams,
        half_steps: int,
        last: Axis,
        size: tuple[int, int],
        guard: Guard | None = None,
        row_mass: torch.Tensor | None = None,
        column_mass: torch.Tensor | None = None,
        lowering: Lowering = "materialised",
    ) -> None:
        """Set up the operator; arguments beside these two are as of `SmallSinkhorn`.

        Args:
            params: the network, whose dual is that of the axis which is not normalised last.
            half_steps: after the network; odd, so that they begin and end on the same axis.
            last: as there.
            size: as there.
            guard: as there.
            row_mass: as there.
            column_mass: as there.
            lowering: as there.
        """
        # The half-step that a softmax has taken is one of those that the network stands for.
        plain = None if guard is None else replace(guard, kernel="plain")
        super().__init__(half_steps, last, size, plain, row_mass, column_mass, lowering)
        self.layers = len(params.weights)
        for number, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
            self.register_buffer(f"weight_{number}", weight)
            self.register_buffer(f"bias_{number}", bias)
        n, m = size
        of_rows = other(last) == "rows"
        ends = (torch.eye(n), torch.ones(m, 1)) if of_rows else (torch.ones(n, 1), torch.eye(m))
        places = torch.kron(*ends).double()
        self.dual_shape = (n, 1, -1) if of_rows else (1, m, -1)  # interleaved
        self.register_buffer("places", places, persistent=False)  # where each entry of the dual is added
        # What is added to a whole row, or column, its dual takes away.
        self.register_buffer("means", -places.t() / places.sum(dim=0).unsqueeze(1), persistent=False)

    places: torch.Tensor
    means: torch.Tensor

    @property
    def coefficients(self) -> list[str]:
        """Names of the buffers with what was fitted."""
        return [f"{part}_{number}" for number in range(self.layers) for part in ("weight", "bias")]

    def from_kernel(
        self,
        kernel: torch.Tensor,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute what `forward` does from the exponentials of the scores, where these are the kernel."""
        return self.forward(torch.log(kernel.clamp_min(torch.finfo(kernel.dtype).tiny)), values=values)

    def kernels(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kernel of arranged scores with the estimated dual in it, twice: half-steps start from it."""
        n, m = self.size
        flat = scores.reshape(n * m, -1) if self.interleaved else scores.reshape(-1, n * m)
        dual = self.dual(flat)
        exponent = scores + dual.reshape(self.dual_shape) if self.interleaved else flat + dual
        kernel = torch.exp(exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT))
        return kernel, kernel

    def dual(self, scores: torch.Tensor) -> torch.Tensor:
        """Estimate the dual of one axis, as of `places` at all entries where matrices are packed.

        Args:
            scores: (matrices, N * M), or interleaved (N * M, matrices).
        """
        values = scores
        for number in range(self.layers - 1):
            weight, bias = self.layer(number, scores)
            values = torch.relu(self.affine(weight, self.upright(bias), values))
        (weight, bias), means = self.layer(self.layers - 1, scores), self.means.to(scores)
        if not self.interleaved:
            places = self.places.to(scores)
            weight, bias, means = places @ weight, places @ bias, places @ means
        return self.affine(weight, self.affine(means, self.upright(bias), scores), values)

    def layer(self, number: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of a layer in the type of a tensor."""
        return getattr(self, f"weight_{number}").to(like), getattr(self, f"bias_{number}").to(like)

    def affine(self, weight: torch.Tensor, constant: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return weight times values plus a constant, channels first or last as the layout has them."""
        one, two = (weight, values) if self.interleaved else (values, weight.t())
        return torch.addmm(constant, one, two)

    def upright(self, bias: torch.Tensor) -> torch.Tensor:
        """Return a bias along the axis of the channels."""
        return bias.unsqueeze(-1) if self.interleaved else bias
