"""A text classifier. Shapes at line ends: B batch, N tokens, C width."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from asapc.models.blocks import Block, largest


class TextTransformer(nn.Module):
    """Classifies texts of up to `length` tokens; pools as vit.py does."""

    def __init__(
        self,
        vocabulary: int = 4096,
        length: int = 128,
        classes: int = 2,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        epsilon: float = 1.0,
        iterations: int = 5,
        attention: str = "sinkhorn",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.5 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, epsilon, iterations, attention, options) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, N) in [0, vocabulary) to logits (B, classes).

        Args:
            tokens: the tokens, at most `length`.
            mask: (B, N), true where a token is real; None where all are. A token's place counts real ones alone.
        """
        if mask is None:
            places = self.position[: tokens.shape[1]]
        else:
            places = self.position[(mask.long().cumsum(dim=1) - 1).clamp_min(0)]  # B N C
        x = self.embed(tokens) + places
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(largest(self.norm(x), mask))
