"""Activation functions that are trained: networks of `relu.networks`, one for each channel of a larger network.

Side by side they are one network of block-diagonal layers, as arXiv 2311.18022 extends them to several inputs. A model
trains them with its other weights: first peaks and scales, which keep every function convex or concave with 2^d pieces,
then, optionally, all weights.
"""

import torch
from torch import Tensor, nn

from asapc.relu.networks import Manifold, ReLUNetworks, evaluate, to_networks, to_peaks


class TrainedActivation(nn.Module):
    """Applies a function of its own to each of C channels, element by element, in ReLU alone.

    Each starts as a parabola, from 0 at the lower end of its domain to half the domain's width at the upper, with the
    slopes of a ReLU at either end and beyond, which are trained as well.
    """

    networks: ReLUNetworks | None

    def __init__(self, channels: int, depth: int = 3, domain: tuple[float, float] = (-3.0, 3.0)) -> None:
        """Set up functions on the manifold.

        Args:
            channels: C.
            depth: d, at least 1; there are 2^d pieces within the domain.
            domain: interval of the pieces, ideally the range of most inputs.

        Raises:
            ValueError: there is no channel, no layer, or no interval.
        """
        super().__init__()
        if channels < 1 or depth < 1 or not domain[0] < domain[1]:
            raise ValueError(f"channels {channels}, depth {depth}, domain {domain}: need 1, 1, and low < high at least")
        self.low, self.width = domain[0], domain[1] - domain[0]
        one = torch.ones(channels)
        self.logits = nn.Parameter(torch.zeros(channels, depth + 1))
        self.scale, self.slope = nn.Parameter(one * self.width / 8), nn.Parameter(one * self.width / 2)
        self.intercept = nn.Parameter(0 * one)
        self.below, self.above = nn.Parameter(0 * one), nn.Parameter(one * self.width)  # slopes by t
        self.networks = None

    def manifold(self) -> Manifold:
        """Return the functions of t in [0, 1] as points of the manifold."""
        return Manifold(to_peaks(self.logits), self.scale, self.slope, self.intercept)

    def free(self) -> None:
        """Leave the manifold: the functions stay the same, and from now on all their weights are trained.

        The parameters are new, so the optimiser must be created again.
        """
        if self.networks is None:
            with torch.no_grad():
                self.networks = to_networks(self.manifold())
            del self.logits, self.scale, self.slope, self.intercept

    def forward(self, x: Tensor) -> Tensor:
        """Return the values (..., C) at inputs (..., C)."""
        channels_first = (x - self.low).div(self.width).movedim(-1, 0)
        t = channels_first.flatten(1)
        beyond = torch.relu(t - 1)
        inside = torch.relu(t) - beyond
        values = evaluate(self.manifold(), inside) if self.networks is None else self.networks(inside)
        values = values - self.below.unsqueeze(-1) * torch.relu(-t) + self.above.unsqueeze(-1) * beyond
        return torch.unflatten(values, 1, channels_first.shape[1:]).movedim(0, -1)
