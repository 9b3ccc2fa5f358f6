"""What all kernels of attention share: how they are called, and how they leave out padding.

Shapes here and in the kernels: B batch, H heads, N queries, M keys, D head size, E channels of the values.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Kernel(nn.Module, ABC):
    """Attention between queries and keys as they are, without projections.

    Padding may stand anywhere and hold any finite numbers: each sample's outputs and gradients are those of its real
    tokens alone.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """Return the outputs (B, H, N, E), zero for padded queries.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, H, M, D).
            v: values (B, H, M, E).
            query_mask: (B, N), true where a query is real; None where all are.
            key_mask: (B, M), likewise.
        """
        return self.plan(q, k, query_mask, key_mask) @ v

    @abstractmethod
    def plan(self, q: Tensor, k: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Return the attention matrix (B, H, N, M) by which `forward` multiplies the values.

        Rows of real queries sum to 1; rows and columns of padding are zero, and so is all of it where either side is
        nothing but padding.
        """


def live_pairs(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """Return where query and key are both real, broadcast to (B, 1, N, M); None where all are."""
    if rows is None or columns is None:
        return columns if rows is None else rows
    return rows & columns


def rows_of(mask: Tensor | None) -> Tensor | None:
    """Return a mask (B, N) of queries as (B, 1, N, 1)."""
    return None if mask is None else mask[:, None, :, None]


def columns_of(mask: Tensor | None) -> Tensor | None:
    """Return a mask (B, M) of keys as (B, 1, 1, M)."""
    return None if mask is None else mask[:, None, None, :]


def keep(values: Tensor, live: Tensor | None, other: float) -> Tensor:
    """Return values where they are live, and a number elsewhere; all of them where `live` is None."""
    return values if live is None else torch.where(live, values, other)


def hide(scores: Tensor, live: Tensor | None) -> Tensor:
    """Return scores that are so low where they are not live that their exponentials vanish.

    They stay finite: -inf makes NaN of gradients where whole rows or columns are padding.
    """
    return keep(scores, live, torch.finfo(scores.dtype).min / 2)


def require_positive(**arguments: float) -> None:
    """Raise ValueError, which names the argument, unless all are above zero."""
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
