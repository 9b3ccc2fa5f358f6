"""Networks that take 4 x 4 scores to the dual of their plan's rows, which `benchmarks.amortised_tiny` tries.

Shapes: K sets of scores, T tokens.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from asapc.ops.small import SmallSinkhorn
from asapc.relu.trained import TrainedActivation
from asapc.types.options import Lowering
from benchmarks.tiny import GUARD, ITERATIONS

SIDE, ENTRIES, DEPTH = 4, 16, 3  # of plans; a compelled function has 2^DEPTH pieces
EXACT = 2 * ITERATIONS  # half-steps

Layers = list[tuple[Tensor, Tensor]]  # weights (K, out, in) and biases (K, out)

MEAN = torch.full((SIDE, SIDE), 1 / SIDE)
# Of matrices as rows of 16 numbers: what makes the means of their rows, and what takes means of rows and columns away.
ROW_MEANS = torch.kron(torch.eye(SIDE), MEAN[:1])
CENTRE = torch.kron(torch.eye(SIDE) - MEAN, torch.eye(SIDE) - MEAN)
# What an entry may read where all rows, and all columns, are alike: itself, and the means of its row, of its column and
# of all (Hartford et al. 2018, "Deep Models of Interactions Across Sets").
PATTERNS = torch.stack([torch.kron(one, two) for one in (torch.eye(SIDE), MEAN) for two in (torch.eye(SIDE), MEAN)])


class Network(nn.Module):
    """K networks side by side, one for each set of scores, from these to the dual of the plan's rows.

    What is added to a whole row of scores its dual takes away, so that networks see centred scores alone.
    """

    phases = 1  # of the training

    def __init__(self, scores: Tensor, alike: bool = False) -> None:
        """Set up what normalises scores like these (K, T, 16): each entry by its own mean and spread, or all alike."""
        super().__init__()
        centred = scores @ CENTRE
        mean = centred.mean(dim=1)
        mean = mean.mean(dim=1, keepdim=True).expand_as(mean) if alike else mean
        variance = (centred - mean.unsqueeze(1)).square().mean(dim=1)
        variance = variance.mean(dim=1, keepdim=True).expand_as(variance) if alike else variance
        self.register_buffer("mean", mean.clone())
        self.register_buffer("spread", variance.sqrt())

    def plain_layers(self) -> Layers:
        """Return the layers, for normalised scores."""
        raise NotImplementedError

    def layers(self) -> Layers:
        """Return the layers for scores as they are: centring and normalising are part of the first."""
        (weight, bias), *others = self.plain_layers()
        weight = weight / self.spread.unsqueeze(1)
        return [(weight @ CENTRE, bias - (weight @ self.mean.unsqueeze(-1)).squeeze(-1)), *others]

    def activate(self, hidden: Tensor, channels: tuple[int, ...]) -> Tensor:
        """Apply what stands between layers, along axes that together are sets and channels."""
        return torch.relu(hidden)

    def forward(self, scores: Tensor) -> Tensor:
        """Map scores (K, T, 16) to duals (K, T, 4)."""
        *hidden, (weight, bias) = self.layers()
        values = scores
        for of_layer, bias_of_layer in hidden:
            values = self.activate(torch.baddbmm(bias_of_layer.unsqueeze(1), values, of_layer.mT), (0, 2))
        return torch.baddbmm(bias.unsqueeze(1), values, weight.mT) - scores @ ROW_MEANS.T

    def alone(self, number: int) -> "Network":
        """Return a copy of the network of one set."""
        network, sets = copy.deepcopy(self), len(self.mean)
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.unflatten(0, (sets, -1))[number].clone()
        return network

    def free(self) -> None:
        """Prepare for the next phase of the training."""


def weights(*shape: int) -> nn.Parameter:
    """Return random weights, the inputs on the last axis."""
    return nn.Parameter(torch.randn(shape) * (2 / shape[-1]) ** 0.5)


class Ordinary(Network):
    """Networks of two hidden layers."""

    def __init__(self, scores: Tensor, width: int) -> None:
        super().__init__(scores)
        sets, sizes = len(scores), (ENTRIES, width, width, SIDE)
        self.weights = nn.ParameterList(weights(sets, sizes[i + 1], sizes[i]) for i in range(3))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(sets, size)) for size in sizes[1:])

    def plain_layers(self) -> Layers:
        """Return the layers, for normalised scores."""
        return list(zip(self.weights, self.biases, strict=True))


class Shared(Network):
    """The same with weights that are shared: where rows or columns of scores change places, so do those of the dual.

    A layer has channels of 16 entries. Written out it is an ordinary one of their width, and takes as long.
    """

    def __init__(self, scores: Tensor, width: int) -> None:
        super().__init__(scores, alike=True)
        sets, channels = len(scores), width // ENTRIES
        self.first = weights(sets, channels, 1, len(PATTERNS))
        self.second = weights(sets, channels, channels, len(PATTERNS))
        self.last = weights(sets, channels)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(sets, channels)) for _ in range(2))

    def plain_layers(self) -> Layers:
        """Return the layers, for normalised scores, written out."""
        hidden = [
            (
                torch.einsum("koip,pab->koaib", of_layer, PATTERNS).flatten(3, 4).flatten(1, 2),
                bias.repeat_interleave(ENTRIES, dim=1),
            )
            for of_layer, bias in zip((self.first, self.second), self.biases, strict=True)
        ]
        last = torch.einsum("kc,re->krce", self.last, ROW_MEANS).flatten(2)
        return [*hidden, (last, last.new_zeros(len(last), SIDE))]


class Compelled(Network):
    """Sums of functions of one variable each, which are compelled to have many pieces (arXiv 2311.18022).

    They stay so in the first phase of the training; in the second all their weights are free.
    """

    phases = 2

    def __init__(self, scores: Tensor, width: int) -> None:
        super().__init__(scores)
        sets, channels = len(scores), width // 4
        self.first, self.last = weights(sets, channels, ENTRIES), weights(sets, SIDE, channels)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(sets, size)) for size in (channels, SIDE))
        self.functions = TrainedActivation(sets * channels, DEPTH)

    def plain_layers(self) -> Layers:
        """Return the layers around the functions, for normalised scores."""
        return list(zip((self.first, self.last), self.biases, strict=True))

    def activate(self, hidden: Tensor, channels: tuple[int, ...]) -> Tensor:
        """Apply a function to each channel of each set."""
        ends = tuple(range(-len(channels), 0))
        moved = hidden.movedim(channels, ends)
        values = self.functions(moved.flatten(ends[0]))
        return values.unflatten(-1, moved.shape[ends[0] :]).movedim(ends, channels)

    def free(self) -> None:
        """Leave the manifold of compelled functions."""
        self.functions.free()


# By name: the kind and its width, that of a hidden layer.
KINDS: Mapping[str, tuple[type[Any], int]] = {
    **{f"ordinary, {width}": (Ordinary, width) for width in (16, 32, 64)},
    **{f"shared, {width}": (Shared, width) for width in (32, 64)},
    "compelled, 32": (Compelled, 32),
}


@cache
def loop(half_steps: int, lowering: Lowering = "materialised") -> SmallSinkhorn:
    """Return a loop of so many half-steps, from scores."""
    return SmallSinkhorn(half_steps, "columns", (SIDE, SIDE), GUARD, None, torch.ones(1), lowering)


def plans(network: Network, scores: Tensor, half_steps: int) -> Tensor:
    """Return the plans (K, T, 16) that half-steps make of scores (K, T, 16) after networks."""
    kernel = torch.exp(scores + network(scores).repeat_interleave(SIDE, dim=-1)).flatten(0, 1)
    return loop(half_steps).scale(kernel, kernel).unflatten(0, (len(scores), -1))


def exact_plans(scores: Tensor) -> Tensor:
    """Return the plans of the loop as written, computed in float64, for scores (K, T, 16)."""
    return loop(EXACT)(scores.double().unflatten(-1, (SIDE, SIDE))).flatten(-2).float()


class Timed(nn.Module):
    """A network and its half-steps as a compiler would write them: on packed plans, or on interleaved ones."""

    def __init__(self, network: Network, half_steps: int, lowering: Lowering) -> None:
        """Take over a network of one set."""
        super().__init__()
        self.network, self.operator = network, loop(half_steps, lowering)
        *hidden, (weight, bias) = network.layers()
        means = ROW_MEANS
        if not self.operator.interleaved:  # the dual stands at all entries, as sums do
            weight, means = (value.repeat_interleave(SIDE, dim=-2) for value in (weight, means))
            bias = bias.repeat_interleave(SIDE, dim=-1)
        constants = [*(value[0] for layer in (*hidden, (weight, bias)) for value in layer), -means]
        self.constants = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in constants)

    def forward(self, scores: Tensor) -> Tensor:
        """Map scores (1, T, 4, 4) to plans of the same shape."""
        *hidden, weight, bias, means = self.constants
        interleaved = self.operator.interleaved
        flat = scores.reshape(-1, ENTRIES)
        values = flat = flat.t() if interleaved else flat
        for of_layer, bias_of_layer in zip(hidden[::2], hidden[1::2], strict=True):
            values = self.affine(of_layer, self.upright(bias_of_layer), values)
            values = self.network.activate(values, (0,) if interleaved else (1,))
        dual = self.affine(weight, self.affine(means, self.upright(bias), flat), values)
        shape = (SIDE, SIDE, -1)
        kernel = torch.exp(flat.reshape(shape) + dual.reshape(SIDE, 1, -1) if interleaved else flat + dual)
        return self.operator.result(scores.shape, kernel, kernel, None)

    def affine(self, weight: Tensor, constant: Tensor, values: Tensor) -> Tensor:
        """Return weight times values plus a constant, channels first or last as the layout has them."""
        one, two = (weight, values) if self.operator.interleaved else (values, weight.t())
        return torch.addmm(constant, one, two)

    def upright(self, bias: Tensor) -> Tensor:
        """Return a bias along the axis of the channels."""
        return bias.unsqueeze(-1) if self.operator.interleaved else bias
