"""A small language model with manifold-constrained hyper-connections (mHC, arXiv 2512.24880), in one file.

Several residual streams run through the layers. Each layer reads a mixture of them, writes to all, and mixes them by a
matrix of each token's own, which Sinkhorn's iterations make doubly stochastic. Shapes at line ends: B batch, N tokens,
S streams, C width, V vocabulary.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def sinkhorn(scores: torch.Tensor, iterations: int, constant: float) -> torch.Tensor:
    """Make matrices (..., S, S) doubly stochastic: a softmax of the rows, then columns and rows by turns."""
    matrix = scores.softmax(dim=-1) + constant
    matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + constant)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + constant)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + constant)
    return matrix


class HyperConnection(nn.Module):
    """A layer and what connects it to the streams; all three mappings depend on the token."""

    def __init__(self, layer: nn.Module, width: int, streams: int, iterations: int) -> None:
        super().__init__()
        self.layer, self.streams, self.iterations = layer, streams, iterations
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(streams * width, 2 * streams + streams**2, bias=False)
        self.gain = nn.Parameter(torch.full((3,), 0.1))
        self.read, self.write = nn.Parameter(torch.zeros(streams)), nn.Parameter(torch.zeros(streams))
        self.mix = nn.Parameter(2 * torch.eye(streams))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map streams (B, N, S, C) to streams (B, N, S, C)."""
        s = self.streams
        flat = x.flatten(2)
        read, write, mix = self.project(F.rms_norm(flat, flat.shape[-1:])).split([s, s, s * s], dim=-1)
        read = (self.gain[0] * read + self.read).sigmoid()  # B N S
        write = 2 * (self.gain[1] * write + self.write).sigmoid()  # B N S
        matrix = sinkhorn(self.gain[2] * mix.unflatten(-1, (s, s)) + self.mix, self.iterations, 1e-6)  # B N S S
        y = self.layer(self.norm((read.unsqueeze(-2) @ x).squeeze(-2)))  # B N C
        return matrix @ x + write.unsqueeze(-1) * y.unsqueeze(-2)


class CausalAttention(nn.Module):
    """Softmax attention of each token on those up to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # B H N D
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class LanguageModel(nn.Module):
    """Predicts the next of `vocabulary` characters at each of at most `length` places."""

    def __init__(
        self,
        vocabulary: int = 128,
        length: int = 128,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        streams: int = 4,
        iterations: int = 20,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) / math.sqrt(width))
        layers = [
            layer
            for _ in range(depth)
            for layer in (
                CausalAttention(width, heads),
                nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            )
        ]
        self.blocks = nn.Sequential(*[HyperConnection(layer, width, streams, iterations) for layer in layers])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N) to logits (B, N, V)."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]  # B N C
        x = x.unsqueeze(-2).expand(-1, -1, self.streams, -1)  # B N S C
        return self.head(self.norm(self.blocks(x).sum(dim=-2)))
