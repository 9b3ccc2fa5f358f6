"""A Vision Transformer. Shapes at line ends: B batch, N tokens, C width."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from asapc.models.blocks import Block, largest


class VisionTransformer(nn.Module):
    """Classifies images (B, size, size) with one token a pixel; pools by the maximum, see `blocks.largest`."""

    def __init__(
        self,
        size: int = 8,
        classes: int = 10,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        epsilon: float = 0.25,
        iterations: int = 20,
        attention: str = "sinkhorn",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.position = nn.Parameter(0.5 * torch.randn(size * size, width))
        self.blocks = nn.ModuleList(Block(width, heads, epsilon, iterations, attention, options) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map images (B, size, size) in [0, 1] to logits (B, classes).

        Args:
            images: the images.
            mask: (B, size, size), true at pixels that belong to the image; None where all do.
        """
        mask = None if mask is None else mask.flatten(1)
        x = self.embed(images.flatten(1).unsqueeze(-1)) + self.position  # B N C
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(largest(self.norm(x), mask))
