"""One pass as a layer to train: softmax with a bias on the keys, which estimates the dual where a Sinkhorn loop ends.

After a loop that ends on rows the plan is softmax(scores + g), with g the dual of the keys. asapc estimates g from a
few functions of the keys' coordinates, by a linear map that it fits to a trained loop (docs/method.md). Here
directions and map are parameters, and the layer computes the same function. Shapes as in kernel.py, C coordinates.
"""

import math

import torch
from torch import Tensor, nn

from asapc.models.kernel import Kernel, columns_of, keep, require_positive, rows_of
from asapc.models.softmax import softmax

MIN_VARIANCE = 1e-12  # of a coordinate that is constant
WIDEST_KNOT = 1.5  # standard deviations


class OnePass(Kernel):
    """Rows sum to 1, and columns, as far as the map is trained to it, to N / M. It starts as softmax.

    Args:
        heads: number of heads H.
        head_size: D.
        epsilon: temperature of the scores q k^T / sqrt(D).
        coordinates: that the bias is computed from, at most D.
        pieces: linear pieces that hinges give each coordinate; 1 for no hinges.
        paired: whether products of two coordinates are features.

    Raises:
        ValueError: a number is not above zero.

    Attributes:
        query_basis: (H, D, C) directions; products with those of the keys add up to the score, or to most of it.
        key_basis: (H, D, C).
        knots: (H, C, pieces - 1) places of hinges, in standard deviations.
        weights: (H, F) of the features, in the order of `features`.
    """

    def __init__(
        self,
        heads: int,
        head_size: int,
        epsilon: float = 0.25,
        coordinates: int = 8,
        pieces: int = 8,
        paired: bool = True,
    ) -> None:
        super().__init__()
        require_positive(epsilon=epsilon, coordinates=coordinates, pieces=pieces)
        self.epsilon, self.paired = epsilon, paired
        coordinates = min(coordinates, head_size)
        axes = torch.eye(head_size)[:, :coordinates] / math.sqrt(math.sqrt(head_size) * epsilon)
        self.query_basis, self.key_basis = (nn.Parameter(axes.repeat(heads, 1, 1)) for _ in range(2))
        places = torch.linspace(-WIDEST_KNOT, WIDEST_KNOT, pieces - 1)
        self.register_buffer("knots", places.repeat(heads, coordinates, 1))
        pairs = coordinates * (coordinates - 1) if paired else 0  # two features each
        self.weights = nn.Parameter(torch.zeros(heads, coordinates * pieces + 1 + pairs))

    knots: Tensor

    def plan(self, q: Tensor, k: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Return softmax(q k^T / (sqrt(D) epsilon) + bias); see `Kernel.plan`."""
        q, k = keep(q, rows_of(query_mask), 0.0), keep(k, rows_of(key_mask), 0.0)
        features = self.features(q, k, columns_of(query_mask), columns_of(key_mask))
        bias = self.weights.unsqueeze(-2) @ features  # B H 1 M
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return softmax(scores / self.epsilon + bias, query_mask, key_mask)

    def features(self, q: Tensor, k: Tensor, queries: Tensor | None, keys: Tensor | None) -> Tensor:
        """Return the functions (B, H, F, M) of the keys: parabolas, the mean of the queries, pairs, and hinges.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, H, M, D).
            queries: (B, 1, 1, N), true where real; None where all are.
            keys: (B, 1, 1, M), likewise.
        """
        of_queries, own = (q @ self.query_basis).transpose(-1, -2), (k @ self.key_basis).transpose(-1, -2)  # B H C N
        own, others = own - mean(own, keys), mean(of_queries, queries)
        of_queries = of_queries - others
        sd_own, sd_other = mean(own.square(), keys), mean(of_queries.square(), queries)
        sd_own, sd_other = (variance.clamp_min(MIN_VARIANCE).sqrt() for variance in (sd_own, sd_other))
        # The dual between two Gaussians in one dimension, and the term that the mean of the queries causes.
        groups = [-0.5 * sd_other / sd_own * own.square(), -(own * others).sum(dim=-2, keepdim=True)]
        if self.paired:  # the same between Gaussians in several dimensions, to first order in the correlations
            i, j = torch.triu_indices(own.shape[-2], own.shape[-2], 1, device=own.device)
            scaled = own * (sd_other / sd_own).sqrt()
            products = scaled[..., i, :] * scaled[..., j, :]
            for centred, sd, live in ((own, sd_own, keys), (of_queries, sd_other, queries)):
                standard = centred / sd
                groups.append(products * mean(standard[..., i, :] * standard[..., j, :], live))
        hinges = torch.relu(own.unsqueeze(-2) - self.knots.unsqueeze(-1) * sd_own.unsqueeze(-2))  # B H C P M
        groups.append((sd_other.unsqueeze(-2) * hinges).flatten(-3, -2))
        return torch.cat(groups, dim=-2)


def mean(values: Tensor, live: Tensor | None) -> Tensor:
    """Average over the last axis what is real: (..., 1)."""
    if live is None:
        return values.mean(dim=-1, keepdim=True)
    return keep(values, live, 0.0).sum(dim=-1, keepdim=True) / live.sum(dim=-1, keepdim=True).clamp_min(1)
