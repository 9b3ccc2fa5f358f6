"""What costs are measured on: operators with random weights, each with the product that makes its scores."""

import torch
from torch import Tensor, nn

from asapc.ops.features import pairs_of
from asapc.ops.sinkhorn import Sinkhorn
from asapc.ops.sliced_dual import SlicedDual
from asapc.planning.bases import COORDINATES
from asapc.planning.costs import Shape
from asapc.types.choices import Side, SlicedDualParams

# (batch, heads, queries, keys, head size) and operators that tell all kinds of work apart in a few minutes. Fitted to
# these alone, of all that `python -m benchmarks.costs` has measured, costs estimate the rest as closely: off by 11 % in
# the median, where costs fitted to all of it are off by 12 %.
FEW_SHAPES = (
    Shape(1, 4, 64, 64, 16),
    Shape(32, 4, 64, 64, 16),
    Shape(8, 4, 128, 128, 16),
    Shape(4, 8, 256, 256, 64),
    Shape(1, 8, 1024, 1024, 64),
)
FEW_OPERATORS = (
    *("softmax", "exact 3", "exact 10", "exact 40", "parabolas, 0 steps", "parabolas, 1 step, wide", "hinges, 0 steps"),
    *("pairs, 0 steps", "pairs, 3 steps", "8 slices, 1 step", "softmax, fused", "exact 4, fused"),
)


class Attention(nn.Module):
    """An operator with the product that makes its scores."""

    def __init__(self, operator: Sinkhorn | SlicedDual, scale: float) -> None:
        super().__init__()
        self.operator, self.scale = operator, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries (B, H, N, D), keys and values (B, H, M, D) to outputs (B, H, N, D)."""
        scaled = q * self.scale
        if self.operator.lowering == "fused":
            fused: Tensor = self.operator.from_points(scaled, q, k, v)
            return fused
        scores = k @ scaled.transpose(-1, -2) if self.operator.turned else scaled @ k.transpose(-1, -2)
        # Products alone are in the precision of half-precision inputs.
        out: Tensor = self.operator.oriented(scores.to(torch.promote_types(q.dtype, torch.float32)), q, k, v)
        return out


def sliced_dual(
    heads: int,
    size: int,
    slices: int,
    pieces: int,
    steps: int,
    side: Side = "keys",
    wide: bool = False,
    paired: bool = False,
    coordinates: int = COORDINATES,
    one_pass: bool = False,
) -> SlicedDual:
    """Return a sliced dual with small random weights."""
    generator = torch.Generator().manual_seed(0)
    coordinates = min(coordinates, size)
    features = slices + coordinates + 1 + coordinates * max(pieces - 1, 0)
    features += 2 * pairs_of(coordinates).shape[-1] * paired
    knots = torch.linspace(-1.5, 1.5, max(pieces - 1, 0)).expand(heads, coordinates if pieces else 0, -1)
    weights = (torch.randn(heads, features + k, generator=generator) / features for k in range(1 + steps))
    basis = torch.eye(size)[:, :coordinates].expand(heads, -1, -1) / size**0.25
    params = SlicedDualParams(basis, basis, slices, knots.contiguous(), tuple(weights), side, paired, one_pass)
    return SlicedDual(params, wide=wide)


def operators(heads: int, size: int) -> dict[str, Sinkhorn | SlicedDual]:
    """Return what is measured, by name."""
    return {
        "softmax": Sinkhorn(1),
        "exact 3": Sinkhorn(3),
        "exact 10": Sinkhorn(10),
        "exact 40": Sinkhorn(40),
        "exact 10, wide": Sinkhorn(10, wide=True),
        "parabolas, 0 steps": sliced_dual(heads, size, 0, 0, 0),
        "parabolas, 3 steps": sliced_dual(heads, size, 0, 0, 3),
        "parabolas, 0 steps, queries": sliced_dual(heads, size, 0, 0, 0, "queries"),
        "parabolas, 2 steps, queries": sliced_dual(heads, size, 0, 0, 2, "queries"),
        "parabolas, 1 step, wide": sliced_dual(heads, size, 0, 0, 1, wide=True),
        "hinges, 0 steps": sliced_dual(heads, size, 0, 8, 0),
        "hinges, 2 steps": sliced_dual(heads, size, 0, 8, 2),
        "pairs, 0 steps": sliced_dual(heads, size, 0, 0, 0, paired=True),
        "pairs, 3 steps": sliced_dual(heads, size, 0, 0, 3, paired=True),
        "hinges and pairs, 1 step": sliced_dual(heads, size, 0, 8, 1, paired=True),
        "8 slices, 1 step": sliced_dual(heads, size, 8, 0, 1),
        "softmax, fused": fused(Sinkhorn(1)),
        "exact 4, fused": fused(Sinkhorn(4)),
        "parabolas, 0 steps, queries, fused": fused(sliced_dual(heads, size, 0, 0, 0, "queries")),
        "hinges, 1 step, fused": fused(sliced_dual(heads, size, 0, 8, 1)),
    }


def fused(operator: Sinkhorn | SlicedDual) -> Sinkhorn | SlicedDual:
    """Return the operator, to be lowered to fused passes."""
    operator.lowering = "fused"
    return operator
