"""What encoders are built of: kernels of attention by name, attention, blocks. B batch, N and M tokens, C width."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from asapc.models.kernel import Kernel
from asapc.models.one_pass import OnePass
from asapc.models.sinkhorn import Sinkhorn
from asapc.models.sliced import SlicedTransport
from asapc.models.softmax import Softmax


def kernel(
    attention: str, heads: int, head_size: int, epsilon: float = 0.25, iterations: int = 20, **options: Any
) -> Kernel:
    """Return a kernel by its name.

    Args:
        attention: "softmax", "sinkhorn", "sliced" or "one_pass".
        heads: number of heads.
        head_size: channels of each.
        epsilon: temperature of Sinkhorn and of one pass.
        iterations: of Sinkhorn; softmax where that is 0.
        options: further arguments of the kernel's class.

    Raises:
        ValueError: there is no such attention, or a number is not above zero.
        TypeError: its class has no such argument.
    """
    match attention:
        case "sinkhorn" if iterations:
            return Sinkhorn(epsilon, iterations, **options)
        case "sinkhorn":
            return Softmax()
        case "softmax":
            return Softmax(**options)
        case "sliced":
            return SlicedTransport(**options)
        case "one_pass":
            return OnePass(heads, head_size, epsilon, **options)
    raise ValueError(f"there is no attention {attention!r}; there are softmax, sinkhorn, sliced and one_pass")


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context.

    Args:
        width: C.
        heads: number of heads, which divides the width.
        epsilon: see `kernel`, also for what follows.
        iterations: likewise.
        attention: likewise.
        options: likewise.

    Raises:
        ValueError: the width is no multiple of the heads, or see `kernel`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        epsilon: float = 0.25,
        iterations: int = 20,
        attention: str = "sinkhorn",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared out among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.kernel = kernel(attention, heads, width // heads, epsilon, iterations, **(options or {}))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C).

        Args:
            x: the tokens that ask.
            context: (B, M, C), the tokens that are asked; None for x itself.
            mask: (B, N), true where a token is real; None where all are.
            context_mask: (B, M), likewise.
        """
        q, k, v = self.points(x, context)
        # Not called as a module: a site is named after the module that it stands in, and this is the one people know.
        mixed = self.kernel.forward(q, k, v, mask, mask if context is None else context_mask)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))  # B N C

    def plan(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Return the attention matrix (B, H, N, M) of `forward`."""
        q, k, _ = self.points(x, context)
        return self.kernel.plan(q, k, mask, mask if context is None else context_mask)

    def points(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return queries (B, H, N, D), keys and values (B, H, M, D)."""
        if context is None:
            return self.split(self.qkv(x), 3)
        sizes = [x.shape[-1], 2 * x.shape[-1]]
        (of_queries, of_rest), (query_bias, rest_bias) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
        queries, rest = F.linear(x, of_queries, query_bias), F.linear(context, of_rest, rest_bias)
        return *self.split(queries, 1), *self.split(rest, 2)

    def split(self, tokens: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Return the parts (B, H, N, D) that stand side by side in tokens (B, N, parts C)."""
        b, n, c = tokens.shape
        return tokens.view(b, n, parts, self.heads, c // parts // self.heads).permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and around a skip connection.

    The arguments are those of `Attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        epsilon: float = 0.25,
        iterations: int = 20,
        attention: str = "sinkhorn",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, epsilon, iterations, attention, options)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C); the arguments are those of `Attention.forward`."""
        context = None if context is None else self.norm1(context)
        x = x + self.attention(self.norm1(x), context, mask, context_mask)
        return x + self.mlp(self.norm2(x))


def largest(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the largest value (B, C) of each channel of tokens (B, N, C) that are real; 0 where none are.

    Encoders pool by it and not by the mean: the mean over tokens of a doubly-stochastic attention is the mean of its
    values, whatever the plan, so the last layer would have no effect.
    """
    if mask is None:
        return x.amax(dim=1)
    pooled = x.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)
    return torch.where(mask.any(dim=1, keepdim=True), pooled, 0.0)
