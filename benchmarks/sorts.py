"""What sorted potentials take in ONNX Runtime in other forms than the one that is shipped.

    python -m benchmarks.sorts     # two minutes

Eight slices of 8 heads, queries and keys of one length. Shipped: TopK of each, the result scattered back. Others: one
TopK of both, stacked; a second TopK, of the order, and a gather in place of the scatter; integers that hold value and
place in one, so that TopK has less to carry. Two TopK alone are the floor of them all, parabolas and hinges of the same
coordinates what a dual is estimated from without a sort. Writes benchmarks/results/sorts.json.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from asapc.ops.features import dual_features
from asapc.ops.potentials import potentials
from asapc.timing.rounds import measure
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.attention import onnx_runner

RESULTS = Path(__file__).resolve().parent / "results" / "sorts.json"
HEADS, SLICES, PIECES = 8, 8, 8
SHAPES = ((1, 256), (1, 1024), (1, 2048), (8, 1024))  # batch, length
PLACES = 12  # bits for a place in an integer; the value has what is left of 31
SECONDS = 5.0


class Shipped(nn.Module):
    """As `potentials` has it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map projections (B, H, L, N) of queries and keys to potentials (B, H, L, N)."""
        return potentials(x, y)


class Stacked(nn.Module):
    """One TopK of both."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the same as `Shipped`."""
        values, order = torch.topk(torch.stack([x, y]), x.shape[-1], dim=-1)
        f = torch.zeros_like(x).scatter(-1, order[0], along(values[0], values[1]))
        return f - f.mean(dim=-1, keepdim=True)


class Gathered(nn.Module):
    """The order turned round by a sort of its own, so that nothing is scattered."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the same as `Shipped`."""
        x_sorted, order = torch.topk(x, x.shape[-1], dim=-1)
        y_sorted, _ = torch.topk(y, y.shape[-1], dim=-1)
        _, ranks = torch.topk(order, x.shape[-1], dim=-1, largest=False)
        f = torch.gather(along(x_sorted, y_sorted), -1, ranks)
        return f - f.mean(dim=-1, keepdim=True)


class Packed(nn.Module):
    """Integers of value and place."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the same as `Shipped`, except for what is lost in the integers."""
        x_order, y_order = (torch.topk(pack(t), t.shape[-1], dim=-1)[0] % 2**PLACES for t in (x, y))
        x_order, y_order = x_order.long(), y_order.long()
        x_values = along(torch.gather(x, -1, x_order), torch.gather(y, -1, y_order))
        f = torch.zeros_like(x).scatter(-1, x_order, x_values)
        return f - f.mean(dim=-1, keepdim=True)


class SortsAlone(nn.Module):
    """Both TopK, and no more than it takes to keep them."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the sorts of `Shipped` alone; the result is of no use."""
        x_sorted, order = torch.topk(x, x.shape[-1], dim=-1)
        y_sorted, _ = torch.topk(y, y.shape[-1], dim=-1)
        return x_sorted + y_sorted + order.to(x.dtype)


class SortFree(nn.Module):
    """Parabolas, and hinges where there are knots."""

    knots: Tensor

    def __init__(self, knots: Tensor) -> None:
        super().__init__()
        self.register_buffer("knots", knots)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map the same as `Shipped`, but features (B, H, F, N)."""
        return dual_features(x, y, 0, self.knots)


def along(x_sorted: Tensor, y_sorted: Tensor) -> Tensor:
    """Return the potentials in the order of the queries, up to a constant; of as many queries as keys."""
    slope = (y_sorted[..., :-1] + y_sorted[..., 1:]) / 2
    steps = -slope * (x_sorted[..., 1:] - x_sorted[..., :-1])
    return torch.cat([torch.zeros_like(x_sorted[..., :1]), torch.cumsum(steps, dim=-1)], dim=-1)


def pack(values: Tensor) -> Tensor:
    """Return the integers in the order of the values, their places in the lowest bits."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    whole = ((values - low) * ((2.0 ** (31 - PLACES) - 1) / (high - low))).to(torch.int32)
    return whole * 2**PLACES + torch.arange(values.shape[-1], dtype=torch.int32)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    knots = torch.linspace(-1.5, 1.5, PIECES - 1).expand(HEADS, SLICES, -1)
    modules: dict[str, nn.Module] = {
        "shipped": Shipped(),
        "stacked": Stacked(),
        "gathered": Gathered(),
        "packed": Packed(),
        "both sorts alone": SortsAlone(),
        "parabolas": SortFree(knots[:, :0]),
        "parabolas and hinges": SortFree(knots),
    }
    rows = []
    for batch, length in SHAPES:
        generator = torch.Generator().manual_seed(0)
        samples = Samples({n: torch.randn(max(batch, 2), HEADS, SLICES, length, generator=generator) for n in "xy"})
        expected = modules["shipped"](*samples.inputs.values())
        for name in ("stacked", "gathered"):
            torch.testing.assert_close(modules[name](*samples.inputs.values()), expected)
        with tempfile.TemporaryDirectory() as folder:
            runners = {name: onnx_runner(module, samples, Path(folder)) for name, module in modules.items()}
        row = {run.name: round(run.p50_ms, 3) for run in measure(runners, samples, batch, SECONDS)}
        rows.append({"batch": batch, "length": length, "milliseconds": row})
        print(batch, length, row, flush=True)
    write_json(RESULTS, {"rows": rows, "environment": environment(seed=0)})


if __name__ == "__main__":
    main()
