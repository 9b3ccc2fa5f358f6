"""A point-set transformer with Sinkhorn attention. Shapes at line ends: B batch, N points, C width."""

import torch
import torch.nn as nn

from asapc.models.vit import Block


class PointTransformer(nn.Module):
    """Classifies point sets (B, N, 3) with one token a point, in any order; max pooling as in vit.py."""

    def __init__(
        self,
        classes: int = 10,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        epsilon: float = 0.25,
        iterations: int = 20,
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(*[Block(width, heads, epsilon, iterations) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Map points (B, N, 3) to logits (B, classes)."""
        x = self.norm(self.blocks(self.embed(points)))  # B N C
        return self.head(x.amax(dim=1))
