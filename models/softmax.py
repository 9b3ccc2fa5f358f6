"""Softmax attention (Vaswani et al., "Attention is all you need", NeurIPS 2017). Shapes as in kernel.py."""

import math

import torch
from torch import Tensor

from asapc.models.kernel import Kernel, columns_of, hide, keep, live_pairs, rows_of


def softmax(scores: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
    """Normalise the rows of scores (B, H, N, M); masks and what is returned are those of `Kernel.plan`."""
    live = live_pairs(rows_of(query_mask), columns_of(key_mask))
    return keep(torch.softmax(hide(scores, live), dim=-1), live, 0.0)


class Softmax(Kernel):
    """Each query's weights over the keys sum to 1; what a key receives is not bound."""

    def plan(self, q: Tensor, k: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(D)); see `Kernel.plan`."""
        return softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), query_mask, key_mask)
