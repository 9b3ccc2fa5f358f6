"""A point-set transformer. Shapes at line ends: B batch, N points, C width."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from asapc.models.blocks import Block, largest


class InducedBlock(nn.Module):
    """Attention by way of a few learned points, which ask the tokens, and whom the tokens ask then.

    The induced set attention block of "Set Transformer" (Lee et al., ICML 2019, section 3.1), of blocks that normalise
    first. The arguments but the first are those of `Block`.
    """

    def __init__(self, inducing: int, width: int, *args: Any) -> None:
        super().__init__()
        self.points = nn.Parameter(0.5 * torch.randn(inducing, width))
        self.gather, self.spread = Block(width, *args), Block(width, *args)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        points = self.points.expand(x.shape[0], -1, -1)
        return self.spread(x, self.gather(points, x, context_mask=mask), mask)


class PointTransformer(nn.Module):
    """Classifies point sets (B, N, 3) with one token a point, in any order; pools as vit.py does.

    With `inducing` > 0 its attention goes by way of as many learned points, and is rectangular.
    """

    def __init__(
        self,
        classes: int = 10,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        epsilon: float = 0.25,
        iterations: int = 20,
        attention: str = "sinkhorn",
        options: Mapping[str, Any] | None = None,
        inducing: int = 0,
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        args = width, heads, epsilon, iterations, attention, options
        self.blocks = nn.ModuleList(InducedBlock(inducing, *args) if inducing else Block(*args) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map points (B, N, 3) to logits (B, classes).

        Args:
            points: the points.
            mask: (B, N), true where a point is real; None where all are.
        """
        x = self.embed(points)  # B N C
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(largest(self.norm(x), mask))
