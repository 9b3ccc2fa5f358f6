"""Attention by sliced transport with soft sorting: doubly stochastic without a loop, and not what Sinkhorn computes.

As "ESPFormer: Doubly-Stochastic Attention with Expected Sliced Transport Plans" (Shahbazi et al., ICML 2025) describes
it: along each of a few directions queries and keys are sorted, softly (SoftSort, Prillo and Eisenschlos, ICML 2020),
and matched in that order; the mean of these plans gives more weight to those of lower cost. Written for asapc, with
padding and with other numbers of keys than of queries. Shapes as in kernel.py, and R for ranks.
"""

import numpy as np
import torch
from torch import Tensor

from asapc.models.kernel import Kernel, hide, keep, require_positive, rows_of


class SlicedTransport(Kernel):
    """Rows sum to 1 at any temperature, and columns, the lower it is the closer, to N / M of what is real.

    Args:
        slices: directions that are sorted along: the channels first, as in the paper, then random ones.
        temperature: of the soft sort, in units of squared coordinates.
        sharpness: with which plans of lower cost get more weight; 0 for equal weights.

    Raises:
        ValueError: `slices` or `temperature` is not above zero.
    """

    def __init__(self, slices: int = 8, temperature: float = 1e-3, sharpness: float = 0.1) -> None:
        super().__init__()
        require_positive(slices=slices, temperature=temperature)
        self.slices, self.temperature, self.sharpness = slices, temperature, sharpness

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """Return the outputs, without building the plan; see `Kernel.forward`."""
        q, k = keep(q, rows_of(query_mask), 0.0), keep(k, rows_of(key_mask), 0.0)
        matching = match(q, k, query_mask, key_mask)
        moved = torch.cat([v, k, k.square().sum(dim=-1, keepdim=True)], dim=-1)
        outputs, costs = [], []
        for of_queries, of_keys in zip(self.coordinates(q), self.coordinates(k), strict=True):
            # Each rank is a mean of keys, and each query a mean of ranks: in one direction SoftSort's matrix, in the
            # other its transpose, normalised so that the weights of a query sum to 1.
            by_rank = self.distances(of_keys, key_mask).softmax(dim=-1).to(v.dtype) @ moved  # B H R E
            by_rank = by_rank if matching is None else matching @ by_rank
            ranks = self.distances(of_queries, query_mask).softmax(dim=-2).to(v.dtype).transpose(-1, -2)  # B H N R
            output, keys, squares = (ranks @ by_rank).split([v.shape[-1], k.shape[-1], 1], dim=-1)
            outputs.append(output)
            # |q - k|^2 under the plan, but for |q|^2, which is the same along all slices.
            costs.append(mean(exact(squares.squeeze(-1)) - 2 * exact(q * keys).sum(dim=-1), query_mask))
        weights = torch.softmax(-self.sharpness * torch.stack(costs), dim=0).to(v.dtype)
        return keep(torch.einsum("sbh,sbhne->bhne", weights, torch.stack(outputs)), rows_of(query_mask), 0.0)

    def plan(self, q: Tensor, k: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Return the mean plan: the outputs where the identity is the values; see `Kernel.plan`."""
        identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
        return self.forward(q, k, identity.expand(*k.shape[:-2], -1, -1), query_mask, key_mask)

    def coordinates(self, points: Tensor) -> tuple[Tensor, ...]:
        """Return the coordinates (B, H, N) of points (B, H, N, D) along each direction."""
        size = points.shape[-1]
        if self.slices > size:
            more = torch.tensor(random_directions(size, self.slices - size), dtype=points.dtype, device=points.device)
            points = torch.cat([points, points @ more], dim=-1)
        return points[..., : self.slices].unbind(dim=-1)

    def distances(self, coordinates: Tensor, mask: Tensor | None) -> Tensor:
        """Return -|sorted - coordinates|^2 / temperature (B, H, R, N), padding last and hidden."""
        values = exact(coordinates)
        live = None if mask is None else mask[:, None].expand_as(values)
        order = keep(values, live, torch.inf).argsort(dim=-1)
        distances = (values.gather(-1, order).unsqueeze(-1) - values.unsqueeze(-2)).square()
        pairs = None if live is None else live.gather(-1, order).unsqueeze(-1) & live.unsqueeze(-2)
        return hide(-distances / self.temperature, pairs)


def match(q: Tensor, k: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """Return the shares (..., N, M) of each rank of the queries that go to ranks of the keys; None for the identity.

    Sorted, uniform masses are matched by quantiles: of n queries and m keys the i-th query reaches from i / n to
    (i + 1) / n, the j-th key from j / m to (j + 1) / m.
    """
    if query_mask is None and key_mask is None and q.shape[-2] == k.shape[-2]:
        return None
    n, m = (
        points.shape[-2] if mask is None else mask.sum(dim=-1)[:, None, None, None]
        for points, mask in ((q, query_mask), (k, key_mask))
    )
    i = torch.arange(q.shape[-2], device=q.device).unsqueeze(-1)
    j = torch.arange(k.shape[-2], device=k.device)
    overlaps = torch.minimum((i + 1) * m, (j + 1) * n) - torch.maximum(i * m, j * n)  # times n m
    return overlaps.clamp_min(0).to(q.dtype) / (m + (m == 0))  # none where no key is real


def mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average values (B, H, N) over what is real."""
    if mask is None:
        return values.mean(dim=-1)
    live = mask[:, None]
    return keep(values, live, 0.0).sum(dim=-1) / live.sum(dim=-1).clamp_min(1)


def exact(values: Tensor) -> Tensor:
    """Return values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def random_directions(size: int, number: int) -> list[list[float]]:
    """Return random unit vectors, the same in every run, as the columns of a matrix (size, number)."""
    vectors = np.random.default_rng(0).standard_normal((size, number))
    columns: list[list[float]] = (vectors / np.linalg.norm(vectors, axis=0)).tolist()
    return columns
