"""ReLU networks that are compelled to have exponentially many linear pieces, after arXiv 2311.18022 (ICML 2025).

A tent with its peak in (0, 1) maps the unit interval onto itself, up and down again; d tents in a row make a wave of
2^d pieces. A sum of the waves of 1 to d tents has 2^d pieces, whatever the peaks. If the scale of each wave follows
from the peaks by one rule, the sum is concave, and differentiable in the limit. All of that is a ReLU network of width
4: its channels carry the sum so far, the two units of the next tent, and a constant. Subtracted from an affine function
it is a convex function of one variable with 2^d pieces from about 16 d weights.

Many networks are evaluated side by side: K is their number, P that of the points.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

SUM, RISE, FALL, ONE = range(4)  # channels
WIDTH = 4
# Slopes that differ by less than MIN_CHANGE, relative to the largest, are equal. Pieces shorter than MIN_LENGTH,
# relative to the domain, are rounding.
MIN_CHANGE, MIN_LENGTH = 1e-13, 1e-14
MIN_PEAK = 0.02  # the highest peak is 1 minus that: tents of no width have no slopes


class Manifold(NamedTuple):
    """Networks on the manifold: a point each, from which their weights follow.

    The function is intercept + slope * t - scale * sum of waves, with t in [0, 1] for x in the domain.

    Attributes:
        peaks: (K, d + 1) in (0, 1): those of d tents, and one more by which the last wave is scaled.
        scale: (K,) factor of the sum of waves; the function is convex where it is positive, concave where negative.
        slope, intercept: (K,) of the affine part.
    """

    peaks: Tensor
    scale: Tensor
    slope: Tensor
    intercept: Tensor


def to_peaks(logits: Tensor) -> Tensor:
    """Map numbers of any size to peaks."""
    return MIN_PEAK + (1 - 2 * MIN_PEAK) * torch.sigmoid(logits)


def scale_ratios(peaks: Tensor) -> Tensor:
    """Return the ratio (K, d - 1) of each wave's scale to the previous one's: (1 - a_i) a_(i+1) (Theorem 3.1)."""
    return (1 - peaks[:, 1:-1]) * peaks[:, 2:]


def tent(t: Tensor, peak: Tensor) -> Tensor:
    """Return the tent at t: it rises linearly from 0 at t = 0 to 1 at the peak, and falls back to 0 at t = 1."""
    return torch.relu(t) / peak - torch.relu(t - peak) / (peak - peak**2)


def sum_of_waves(t: Tensor, peaks: Tensor) -> Tensor:
    """Sum s_i W_i(t) over i with s_0 = 1, tent by tent: concave, 0 at both ends, (K, P).

    Args:
        t: (K, P) or (P,), in [0, 1].
        peaks: (K, d + 1).
    """
    wave = tent(t.expand(peaks.shape[0], -1), peaks[:, :1])
    total, scale = wave, torch.ones_like(peaks[:, :1])
    ratios = scale_ratios(peaks)
    for i in range(1, peaks.shape[1] - 1):
        wave, scale = tent(wave, peaks[:, i : i + 1]), scale * ratios[:, i - 1 : i]
        total = total + scale * wave
    return total


class ReLUNetworks(nn.Module):
    """K fully connected ReLU networks of one input, one output and width 4, side by side.

    Linear(1, 4), ReLU, and d - 1 times Linear(4, 4), ReLU; then Linear(4, 1).
    """

    def __init__(self, first: Tensor, first_bias: Tensor, hidden: Tensor, hidden_bias: Tensor, last: Tensor) -> None:
        """Set up networks with these weights.

        Args:
            first: (K, 4), of the input.
            first_bias: (K, 4).
            hidden: (K, d - 1, 4, 4).
            hidden_bias: (K, d - 1, 4).
            last: (K, 5), of the last layer, its bias at the end.
        """
        super().__init__()
        self.first, self.first_bias = nn.Parameter(first), nn.Parameter(first_bias)
        self.hidden, self.hidden_bias = nn.Parameter(hidden), nn.Parameter(hidden_bias)
        self.last = nn.Parameter(last)

    @property
    def weights(self) -> int:
        """Number of weights of one network."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Return the values (K, P) at points (P,), or (K, P) where each network has its own."""
        x = x.expand(self.first.shape[0], -1).unsqueeze(-2)  # K 1 P
        h = torch.relu(self.first.unsqueeze(-1) * x + self.first_bias.unsqueeze(-1))
        for weights, bias in zip(self.hidden.unbind(dim=1), self.hidden_bias.unbind(dim=1), strict=True):
            h = torch.relu(weights @ h + bias.unsqueeze(-1))
        out: Tensor = (self.last[:, :-1].unsqueeze(-2) @ h).squeeze(-2) + self.last[:, -1:]
        return out

    def jacobian(self, x: Tensor) -> Tensor:
        """Return the derivatives (K, W, P) of the values at points (P,) by all W weights, in the parameters' order."""
        inputs = [x.expand(self.first.shape[0], 1, -1)]
        weights = [self.first.unsqueeze(-1), *self.hidden.unbind(dim=1)]
        biases = [self.first_bias, *self.hidden_bias.unbind(dim=1)]
        for weight, bias in zip(weights, biases, strict=True):
            inputs.append(torch.relu(weight @ inputs[-1] + bias.unsqueeze(-1)))
        of_last = torch.cat([inputs[-1], torch.ones_like(inputs[0])], dim=1)
        back = self.last[:, :-1].unsqueeze(-1) * (inputs[-1] > 0)
        of_weights: list[Tensor] = []
        of_biases: list[Tensor] = []
        for weight, units in zip(reversed(weights), reversed(inputs[:-1]), strict=True):
            of_weights.insert(0, (back.unsqueeze(2) * units.unsqueeze(1)).flatten(1, 2))
            of_biases.insert(0, back)
            back = (weight.transpose(-1, -2) @ back) * (units > 0)
        return torch.cat([of_weights[0], of_biases[0], *of_weights[1:], *of_biases[1:], of_last], dim=1)

    def layers(self, *members: int) -> nn.Sequential:
        """Return the sum of some networks as plain layers, block by block: (P, 1) to (P, 1), exported as Gemm and Relu.

        A function that is neither convex nor concave is a sum of two, one of each kind.
        """
        k = list(members)
        weights = [(self.first[k].reshape(-1, 1), self.first_bias[k].flatten())]
        for matrix, bias in zip(self.hidden[k].unbind(1), self.hidden_bias[k].unbind(1), strict=True):
            weights.append((torch.block_diag(*matrix), bias.flatten()))  # type: ignore[no-untyped-call]
        weights.append((self.last[k, :-1].reshape(1, -1), self.last[k, -1].sum().reshape(1)))
        layers: list[nn.Module] = []
        for matrix, bias in weights:
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], dtype=matrix.dtype)
            layer.weight, layer.bias = nn.Parameter(matrix.detach().clone()), nn.Parameter(bias.detach().clone())
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def to_networks(point: Manifold, domain: tuple[float, float] = (0.0, 1.0)) -> ReLUNetworks:
    """Return the networks that points of the manifold stand for.

    The affine part is added to the running sum in the first layer, with a constant that keeps it above 0.

    Args:
        point: K points, of any float dtype.
        domain: interval that is mapped onto [0, 1].
    """
    peaks, scale = point.peaks, point.scale
    k, depth = peaks.shape[0], peaks.shape[1] - 1
    low, high = domain
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    lift = -point.slope / scale  # of the affine part, in units of the sum
    base = (-lift).clamp_min(0)
    first = torch.stack([lift, one, one, zero], dim=-1)
    first_bias = torch.stack([base, zero, -peaks[:, 0], one], dim=-1)
    ratios = scale_ratios(peaks)
    layers = []
    for i in range(1, depth):
        rising, falling = tent_weights(peaks[:, i - 1])
        ratio = ratios[:, i - 1]
        up, down = ratio * rising, ratio * falling
        rows = {
            SUM: (one, rising, falling, zero),
            RISE: (zero, up, down, zero),
            FALL: (zero, up, down, -ratio * peaks[:, i]),
            ONE: (zero, zero, zero, ratio),
        }
        layers.append(torch.stack([torch.stack(rows[channel], dim=-1) for channel in range(WIDTH)], dim=-2))
    hidden = torch.stack(layers, dim=1) if layers else peaks.new_zeros(k, 0, WIDTH, WIDTH)
    rising, falling = tent_weights(peaks[:, depth - 1])
    constant = point.intercept + scale * base
    last = torch.stack([-scale, -scale * rising, -scale * falling, zero, constant], dim=-1)
    first_bias = first_bias - first * low / (high - low)
    return ReLUNetworks(first / (high - low), first_bias, hidden, peaks.new_zeros(k, depth - 1, WIDTH), last)


def tent_weights(peak: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the two units of a tent, which are relu(t) and relu(t - peak)."""
    return 1 / peak, -1 / (peak - peak**2)


def evaluate(point: Manifold, x: Tensor, domain: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Evaluate the functions by their definition, (K, P): the reference of `to_networks`, and faster to train."""
    t = (x - domain[0]) / (domain[1] - domain[0])
    waves = sum_of_waves(t, point.peaks)
    return point.intercept.unsqueeze(-1) + point.slope.unsqueeze(-1) * t - point.scale.unsqueeze(-1) * waves


def breakpoints(network: nn.Sequential, domain: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return the ends of the linear pieces of a network of one input and one output, and its values there, in float64.

    It tracks units from layer to layer: their values at the breakpoints so far and their slopes between these. Where a
    unit changes its sign, a breakpoint is added. Nothing is sampled; the result is exact up to rounding.

    Args:
        network: as from `ReLUNetworks.layers`.
        domain: ends of an interval.

    Returns:
        Points (Q + 1,) from one end of the domain to the other, and values (Q + 1,), for Q pieces of distinct slopes.
    """
    with torch.no_grad():
        layers = [(layer.weight.double(), layer.bias.double()) for layer in network if isinstance(layer, nn.Linear)]
        x = torch.tensor(domain, dtype=torch.float64)
        values, slopes = x.unsqueeze(0), torch.ones(1, 1, dtype=torch.float64)  # channels by points, by pieces
        for weight, bias in layers[:-1]:
            values, slopes = weight @ values + bias.unsqueeze(-1), weight @ slopes
            unit, piece = (values[:, :-1] * values[:, 1:] < 0).nonzero(as_tuple=True)
            step = -values[unit, piece] / slopes[unit, piece]
            crossings = (x[piece] + step).clamp(x[piece], x[piece + 1])
            at_crossings = values[:, piece] + step * slopes[:, piece]
            at_crossings[unit, torch.arange(unit.numel())] = 0.0
            x, values = torch.cat([x, crossings]), torch.cat([values, at_crossings], dim=-1)
            order = torch.argsort(x, stable=True)
            x, values = x[order], values[:, order]
            # Each piece inherits the slopes of the piece that it is part of.
            origin = torch.cat([torch.arange(len(x) - len(piece)), piece])[order][:-1].clamp(max=slopes.shape[1] - 1)
            middle = (values[:, :-1] + values[:, 1:]) / 2
            values, slopes = torch.relu(values), torch.where(middle > 0, slopes[:, origin], 0.0)
        weight, bias = layers[-1]
        return merge_pieces(x, (weight @ values + bias.unsqueeze(-1))[0], (weight @ slopes)[0])


def merge_pieces(x: Tensor, y: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Return points (Q + 1,) and values of the pieces that have a length and a slope other than the previous one's."""
    long = (x[1:] - x[:-1]) > MIN_LENGTH * (x[-1] - x[0])
    starts, slopes = torch.arange(len(slopes))[long], slopes[long]
    changes = (slopes[1:] - slopes[:-1]).abs() > MIN_CHANGE * slopes.abs().amax()
    ends = torch.cat([starts[:1], starts[1:][changes], torch.tensor([len(x) - 1])])
    return x[ends], y[ends]


def count_pieces(network: nn.Sequential, domain: tuple[float, float] = (0.0, 1.0)) -> int:
    """Count the linear pieces of a network in an interval."""
    return breakpoints(network, domain)[0].numel() - 1
