"""Fits ReLU layers to the smooth activations of a graph, for targets that have no other activation.

Each function is fitted once, on the range of its inputs on calibration samples, by the fewest linear pieces that keep
the error, and continued by straight lines beyond: one hidden layer, a unit a piece. The networks of `relu.networks`
have more pieces from as many units, but no smaller maximum error here (docs/relu.md).
"""

from collections.abc import Callable, Mapping
from math import inf, isfinite

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from asapc.errors import OptionError
from asapc.passes.record import record
from asapc.passes.rewrite.activations import activation, function
from asapc.relu.approx import best_pieces
from asapc.types.results import FittedActivation
from asapc.types.samples import Samples

BATCH = 16
MARGIN = 0.1  # of the range on the samples, added at either end
POINTS = 4000
PIECES = tuple(round(2 ** (k / 4)) for k in range(8, 33))  # 4 to 256: more cost more than any activation


class ReLUActivation(nn.Module):
    """A function of one variable as one hidden layer of ReLU, element by element."""

    def __init__(self, knots: Tensor, heights: Tensor, below: float, above: float) -> None:
        """Set up the layer.

        Args:
            knots: (K,) points where the slope changes, ascending.
            heights: (K,) values there.
            below: slope below the first knot.
            above: slope above the last.
        """
        super().__init__()
        inner = heights.diff() / knots.diff()
        slopes = torch.cat([inner, inner.new_tensor([above])])
        self.first = nn.Linear(1, len(knots) + 1, dtype=knots.dtype)
        self.last = nn.Linear(len(knots) + 1, 1, dtype=knots.dtype)
        with torch.no_grad():
            self.first.weight.fill_(1.0)[0] = -1.0
            self.first.bias.copy_(torch.cat([knots[:1], -knots]))
            self.last.weight.copy_(torch.cat([inner.new_tensor([-below]), slopes[:1], slopes.diff()]))
            self.last.bias.copy_(heights[:1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the values at points of any shape."""
        values: Tensor = self.last(torch.relu(self.first(x.unsqueeze(-1)))).squeeze(-1)
        return values


def fit_activations(module: GraphModule, samples: Samples, error: float) -> list[FittedActivation]:
    """Fit stand-ins for the smooth activations of a graph whose inputs are finite on the samples.

    Args:
        module: the graph, with operators replacing its sites.
        samples: calibration samples.
        error: largest error of each on its range; 0 keeps all activations.

    Raises:
        OptionError: a function would take more pieces than the largest of PIECES.
    """
    if not error:
        return []
    names = {node: name for node in module.graph.nodes if (name := activation(node)) is not None}
    fitted = []
    for name, (low, high) in input_ranges(module, samples, names).items():
        of_name = [node for node in names if names[node] == name]
        margin = MARGIN * (high - low) or 1.0
        if isfinite(margin):
            ends, dtype = (low - margin, high + margin), of_name[0].meta["val"].dtype
            fitted.append(fit_activation(name, function(of_name[0]), ends, error, dtype, len(of_name)))
    return fitted


def input_ranges(module: GraphModule, samples: Samples, names: Mapping[Node, str]) -> dict[str, tuple[float, float]]:
    """Measure the range of the inputs of each function on the samples, over all its nodes."""
    ranges = dict.fromkeys(names.values(), (inf, -inf))
    for batch in samples.batches(BATCH):
        values = record(module, batch, {node.all_input_nodes[0].name for node in names})
        for node, name in names.items():
            inputs, (low, high) = values[node.all_input_nodes[0].name], ranges[name]
            ranges[name] = min(low, inputs.amin().item()), max(high, inputs.amax().item())
    return ranges


def fit_activation(
    name: str,
    function: Callable[[Tensor], Tensor],
    ends: tuple[float, float],
    error: float,
    dtype: torch.dtype = torch.float32,
    nodes: int = 1,
) -> FittedActivation:
    """Fit the stand-in of fewest pieces for one function, see `FittedActivation`.

    Raises:
        OptionError: as in `fit_activations`.
    """
    x = torch.linspace(*ends, POINTS, dtype=torch.float64)
    y = function(x)
    below, above = (((y[i + 1] - y[i]) / (x[i + 1] - x[i])).item() for i in (0, -2))
    points = torch.linspace(*ends, 2 * POINTS, dtype=dtype)
    for pieces in PIECES:
        knots, heights = map(torch.from_numpy, best_pieces(x.numpy(), y.numpy(), pieces))
        module = ReLUActivation(knots, heights, below, above).to(dtype)
        with torch.no_grad():
            largest = (module(points).double() - function(points.double())).abs().amax().item()
        if largest <= error:
            return FittedActivation(name, module, module.first.out_features, largest, *ends, nodes)
    raise OptionError(
        f"{name} from {ends[0]:.3g} to {ends[1]:.3g} is off by {largest:.1e} with {PIECES[-1]} pieces, "
        f"not by {error:g}",
        "give --relu-activations a larger error",
    )
