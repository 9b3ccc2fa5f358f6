"""A matcher of point sets, whose output is a plan. Shapes at line ends: B batch, N and M points, C width."""

from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from asapc.models.blocks import Block, kernel


class Matcher(nn.Module):
    """Matches two point sets by Sinkhorn over scores of their points, as SuperGlue (Sarlin et al., CVPR 2020) does.

    Points of each set ask those of their own and of the other set, by turns; the layers are the same for both. The
    last scores are products of what comes out. `attention` and `options` are those of the layers; the plan is always
    Sinkhorn's, of `epsilon` and `iterations`.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        epsilon: float = 0.25,
        iterations: int = 20,
        attention: str = "sinkhorn",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        args = width, heads, epsilon, iterations, attention, options
        self.own, self.cross = (nn.ModuleList(Block(*args) for _ in range(depth)) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width)
        of_sinkhorn = options if attention == "sinkhorn" and options else {}
        self.kernel = kernel("sinkhorn", 1, width, epsilon, iterations, **of_sinkhorn)

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Map two point sets to the plan (B, N, M) between them, of which rows sum to 1, and columns to about N / M.

        Args:
            source: (B, N, 3).
            target: (B, M, 3).
            source_mask: (B, N), true where a point is real; None where all are.
            target_mask: (B, M), likewise.
        """
        x, y = self.embed(source), self.embed(target)  # B N C, B M C
        for own, cross in zip(self.own, self.cross, strict=True):
            x, y = own(x, mask=source_mask), own(y, mask=target_mask)
            x, y = cross(x, y, source_mask, target_mask), cross(y, x, target_mask, source_mask)
        x, y = (self.head(self.norm(points)).unsqueeze(1) for points in (x, y))  # B 1 N C, B 1 M C
        return self.kernel.plan(x, y, source_mask, target_mask).squeeze(1)
