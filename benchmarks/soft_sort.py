"""Attention by sliced transport with soft sorting: doubly stochastic without a loop, and not what Sinkhorn computes.

As in "ESPFormer: Doubly-Stochastic Attention with Expected Sliced Transport Plans" (Shahbazi et al., ICML 2025): along
each of a few channels queries and keys are sorted, softly (SoftSort, Prillo and Eisenschlos, ICML 2020), and matched in
that order; the plans of all channels are averaged, with more weight on those of lower cost.
"""

import torch
from torch import Tensor, nn


class SlicedSoftSort(nn.Module):
    """Attention over the mean of plans along the first channels.

    Args:
        slices: channels that are sorted.
        temperature: of the soft sort.
        sharpness: with which plans of lower cost get more weight.
    """

    def __init__(self, slices: int = 8, temperature: float = 0.1, sharpness: float = 0.1) -> None:
        super().__init__()
        self.slices, self.temperature, self.sharpness = slices, temperature, sharpness

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries, keys and values (B, H, N, D) to outputs (B, H, N, D)."""
        outputs, costs = [], []
        for channel in range(self.slices):
            to_queries = self.soft_sort(q[..., channel]).transpose(-1, -2)
            of_keys = self.soft_sort(k[..., channel])
            outputs.append(to_queries @ (of_keys @ v))
            # The cost |q - k|^2 under the plan but for a part that is the same for all: the plans' marginals are equal.
            costs.append(-2 * ((to_queries @ (of_keys @ k)) * q).float().mean(dim=(-1, -2)))
        weights = torch.softmax(-self.sharpness * torch.stack(costs), dim=0).to(v.dtype)
        return torch.einsum("sbh,sbhnd->bhnd", weights, torch.stack(outputs))

    def soft_sort(self, values: Tensor) -> Tensor:
        """Return (B, H, N, N), whose rows pick the values (B, H, N) in their order."""
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        in_order = exact.sort(dim=-1).values
        distances = (in_order.unsqueeze(-1) - exact.unsqueeze(-2)).abs()
        return torch.softmax(-distances / self.temperature, dim=-1).to(values.dtype)
