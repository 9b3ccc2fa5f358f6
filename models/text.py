"""A text classifier with Sinkhorn attention. Shapes at line ends: B batch, N tokens, C width."""

import torch
import torch.nn as nn

from asapc.models.vit import Block


class TextTransformer(nn.Module):
    """Classifies texts (B, length), all of the same length, so that no mask is needed; max pooling as in vit.py."""

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
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.5 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads, epsilon, iterations) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, length) in [0, vocabulary) to logits (B, classes)."""
        x = self.embed(tokens) + self.position  # B N C
        x = self.norm(self.blocks(x))
        return self.head(x.amax(dim=1))
