"""A Vision Transformer with Sinkhorn attention, in one file. Shapes at line ends: B batch, N tokens, C width."""

import math

import torch
import torch.nn as nn


def sinkhorn(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """Compute the doubly-stochastic plan of scores (..., N, N) by Sinkhorn's algorithm in the log domain."""
    log_plan = scores
    for _ in range(iterations):
        log_plan = log_plan - torch.logsumexp(log_plan, dim=-2, keepdim=True)  # columns sum to 1
        log_plan = log_plan - torch.logsumexp(log_plan, dim=-1, keepdim=True)  # rows sum to 1
    return log_plan.exp()


class Attention(nn.Module):
    """Multi-head attention; `iterations` full Sinkhorn iterations, or softmax where that is 0."""

    def __init__(self, width: int, heads: int, epsilon: float, iterations: int) -> None:
        super().__init__()
        self.heads, self.epsilon, self.iterations = heads, epsilon, iterations
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, c // self.heads)  # B N 3 H D
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B H N D
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)  # B H N N
        if self.iterations:
            plan = sinkhorn(scores / self.epsilon, self.iterations)
        else:
            plan = scores.softmax(dim=-1)
        return self.proj((plan @ v).transpose(1, 2).reshape(b, n, c))  # B N C


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and around a skip connection."""

    def __init__(self, width: int, heads: int, epsilon: float, iterations: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, epsilon, iterations)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Classifies images (B, size, size) with one token a pixel.

    It pools by the maximum, not the mean: the mean over tokens of a doubly-stochastic attention is the mean of its
    values, whatever the plan, so the last layer would have no effect.
    """

    def __init__(
        self,
        size: int = 8,
        classes: int = 10,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        epsilon: float = 0.25,
        iterations: int = 20,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.position = nn.Parameter(0.5 * torch.randn(size * size, width))
        self.blocks = nn.Sequential(*[Block(width, heads, epsilon, iterations) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, size, size) in [0, 1] to logits (B, classes)."""
        x = self.embed(images.flatten(1).unsqueeze(-1)) + self.position  # B N C
        x = self.norm(self.blocks(x))
        return self.head(x.amax(dim=1))
