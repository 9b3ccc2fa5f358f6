"""Three forms of a piecewise-linear map from coordinates to duals, at equal pieces: hinges, compelled, and then freed.

    python -m benchmarks.teachers  # trains the teachers, once
    python -m benchmarks.relu_maps --only '*seed0'

Each estimates the keys' dual as a sum over coordinates and heads of functions of one coordinate, in standard deviations
of its sample, beside parabolas and the mean of the other side; one ridge mixes them. Beside them sorted slices: 8 in
balanced coordinates, and 32 in random ones, with their parabolas. Hinges stand at quantiles of the
calibration samples; compelled networks have their peaks trained, freed ones all weights from there. relc is that of the
first estimate, without closure steps, mean over sites. Times are of the estimate alone in ONNX Runtime. Writes
benchmarks/results/relu_maps.json.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable
from math import inf
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asapc.ops.features import mean, project, variance
from asapc.passes.record import record
from asapc.planning.activations import activation
from asapc.planning.bases import COORDINATES
from asapc.planning.calibrate import FitKey, calibrate
from asapc.planning.propose import split
from asapc.planning.trials import sliced_dual
from asapc.relu.networks import Manifold, ReLUNetworks, sum_of_waves, to_networks, to_peaks
from asapc.timing.rounds import measure
from asapc.types.choices import FeatureSet, SlicedDualParams
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.attention import onnx_runner
from benchmarks.fits import HELD_OUT, Part, linear, of_slices, part, random_directions, relc
from benchmarks.teachers import studied

RESULTS = Path(__file__).resolve().parent / "results" / "relu_maps.json"
DEPTH, MAX_DEVIATIONS, PENALTY = 3, 3.0, 1e-5  # 8 pieces over three standard deviations to each side
STEPS, FREE_STEPS, RATE, FREE_RATE, LOOK_EVERY = 200, 300, 0.05, 3e-3, 25
LENGTH, HEADS, SIZE = 1024, 8, 64


class Points(NamedTuple):
    """Coordinates of keys (B, H, C, M) in [0, 1], and the factors (B, H, C, 1) of their functions."""

    places: Tensor
    factors: Tensor


def main() -> None:
    """Compare on every teacher, time the estimates, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of teachers, as in a shell")
    only = parser.parse_args().only
    torch.set_flush_denormal(True)
    rows = []
    for name, teacher in studied(only):
        graph, sites, calibration, held_out = teacher.graph, teacher.sites, teacher.calibration, teacher.held_out
        errors = defaultdict(list)
        for site in sites:
            for way, error in compare(graph, site, calibration, held_out[:HELD_OUT]).items():
                errors[way].append(error)
        row = {way: fmean(values) for way, values in errors.items()}
        rows.append({"teacher": name, "relc": row})
        print(f"{name:<34}", "  ".join(f"{way} {error:.4f}" for way, error in row.items()), flush=True)
    times = latencies()
    print(times)
    write_json(RESULTS, {"rows": rows, "milliseconds": times, "length": LENGTH, "environment": environment(seed=0)})


def compare(graph: CapturedGraph, site: Site, calibration: Samples, held_out: Samples) -> dict[str, float]:
    """Return the relc on held-out samples of every form of the map."""
    torch.manual_seed(0)
    selection, fitting = split(calibration)
    features = FeatureSet(pieces=2**DEPTH)
    shipped = calibrate(graph, {site.name: [features]}, [site], fitting, selection, 0)[FitKey(site.name, features)]
    bare = SlicedDualParams(shipped.query_basis, shipped.key_basis, 0, shipped.knots)
    parts = [part(graph, site, bare, samples) for samples in (fitting, selection, held_out)]
    locations = [points(graph, site, bare, samples) for samples in (fitting, selection, held_out)]
    plain = shipped.query_basis.shape[-1] + 1
    results = {
        "parabolas": judge(parts, [p.features[:, :, :plain] for p in parts]),
        "hinges": relc(parts[2], linear(shipped.weights[0].double(), parts[2].features)),
    }
    splits = (fitting, selection, held_out)
    balanced = (shipped.query_basis.double(), shipped.key_basis.double())
    results["8 slices"] = of_slices(graph, site, balanced, 8, splits)
    results["32 random slices"] = of_slices(graph, site, random_directions(site, 32), 32, splits)
    heads, coordinates = locations[0].places.shape[1:3]
    logits = torch.randn(heads * coordinates, DEPTH + 1, dtype=torch.float64).requires_grad_()

    def waves(of: Points) -> Tensor:
        return of.factors * along(of.places, lambda t: sum_of_waves(t, to_peaks(logits)))

    optimiser = torch.optim.Adam([logits], RATE)
    results["compelled"] = descend(optimiser, STEPS, parts, locations, plain, waves)
    with torch.no_grad():
        one = torch.ones(heads * coordinates, dtype=torch.float64)
        networks = to_networks(Manifold(to_peaks(logits), -one, 0 * one, 0 * one))

    def freed(of: Points) -> Tensor:
        return of.factors * along(of.places, networks)

    optimiser = torch.optim.Adam(networks.parameters(), FREE_RATE)
    results["freed"] = descend(optimiser, FREE_STEPS, parts, locations, plain, freed)
    return results


def along(places: Tensor, functions: Callable[[Tensor], Tensor]) -> Tensor:
    """Return one function for each head and coordinate, of (B, H, C, M)."""
    b, h, c, m = places.shape
    flat = places.permute(1, 2, 0, 3).reshape(h * c, b * m)
    return functions(flat).reshape(h, c, b, m).permute(2, 0, 1, 3)


def points(graph: CapturedGraph, site: Site, params: SlicedDualParams, samples: Samples) -> Points:
    """Return coordinates of the keys in standard deviations, mapped to [0, 1], and the deviations of the queries'."""
    values = record(graph.program.module(), samples, {operand.node for operand in site.wiring.operands})
    _, queries, keys = activation(site, values)
    x, y = project(keys, params.key_basis.double()), project(queries, params.query_basis.double())
    x, y = x - mean(x, None), y - mean(y, None)
    spreads = variance(x, None).sqrt(), variance(y, None).sqrt()
    return Points((x / spreads[0] / (2 * MAX_DEVIATIONS) + 0.5).clamp(0, 1), spreads[0] * spreads[1])


def ridge(of: Part, vectors: Tensor) -> Tensor:
    """Return the weights (H, F) of least squares with a small penalty."""
    gram = torch.einsum("bhfm,bhem->hfe", vectors, vectors)
    moment = torch.einsum("bhfm,bhm->hf", vectors, of.target)
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    eye = PENALTY * torch.eye(gram.shape[-1], dtype=gram.dtype)
    factor = torch.linalg.cholesky(gram / scale.unsqueeze(-1) / scale.unsqueeze(-2) + eye)
    return torch.cholesky_solve((moment / scale).unsqueeze(-1), factor).squeeze(-1) / scale


def judge(parts: list[Part], vectors: list[Tensor]) -> float:
    """Return the relc on the last samples, of a ridge on the first."""
    return relc(parts[2], linear(ridge(parts[0], vectors[0]), vectors[2]))


def descend(
    optimiser: torch.optim.Optimizer,
    steps: int,
    parts: list[Part],
    locations: list[Points],
    plain: int,
    functions: Callable[[Points], Tensor],
) -> float:
    """Train on the error of the dual, mixing anew at each step; relc where that on the selection was least."""
    best = (inf, inf)
    for step in range(steps + 1):
        terms = [functions(where) for where in locations]
        vectors = [
            torch.cat([of.features[:, :, :plain], more - more.mean(dim=-1, keepdim=True)], dim=2)
            for of, more in zip(parts, terms, strict=True)
        ]
        with torch.no_grad():
            weights = ridge(parts[0], vectors[0])
            if step % LOOK_EVERY == 0:
                selected, judged = (relc(p, linear(weights, v)) for p, v in zip(parts[1:], vectors[1:], strict=True))
                best = min(best, (selected, judged))
        optimiser.zero_grad()
        (linear(weights, vectors[0]) - parts[0].target).square().mean().backward()
        optimiser.step()
    return best[1]


class Hinges(nn.Module):
    """The shipped estimate."""

    def __init__(self) -> None:
        super().__init__()
        self.operator = sliced_dual(HEADS, SIZE, 0, 2**DEPTH, 0)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Return queries and keys (B, H, N, D) to a dual (B, H, 1, N)."""
        return self.operator.estimates(q, k)


class Slices(Hinges):
    """The same from sorted slices, in the first coordinates or in more than there are."""

    def __init__(self, slices: int) -> None:
        nn.Module.__init__(self)
        self.operator = sliced_dual(HEADS, SIZE, slices, 0, 0, coordinates=max(slices, COORDINATES))


class Parabolas(Hinges):
    """The same without hinges."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.operator = sliced_dual(HEADS, SIZE, 0, 0, 0)


class Networks(Parabolas):
    """The same with a network for each head and coordinate instead of parabolas, one matrix product per layer."""

    def __init__(self) -> None:
        super().__init__()
        count = HEADS * self.operator.query_basis.shape[-1]
        one = torch.ones(count)
        networks: ReLUNetworks = to_networks(Manifold(torch.full((count, DEPTH + 1), 0.4), -one, 0 * one, 0 * one))
        for name, parameter in networks.named_parameters():
            self.register_buffer(name, torch.unflatten(parameter.detach(), 0, (HEADS, -1)))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Return queries and keys (B, H, N, D) to a dual (B, H, 1, N)."""
        x, y = self.operator.coordinates(q, k)
        x, y = x - mean(x, None), y - mean(y, None)
        spreads = variance(x, None).sqrt(), variance(y, None).sqrt()
        t = (x / (spreads[0] * 2 * MAX_DEVIATIONS) + 0.5).clamp(0, 1).unsqueeze(-2)  # B H C 1 N
        h = torch.relu(self.first.unsqueeze(-1) * t + self.first_bias.unsqueeze(-1))
        for i in range(DEPTH - 1):
            h = torch.relu(self.hidden[:, :, i] @ h + self.hidden_bias[:, :, i].unsqueeze(-1))
        outputs = (self.last[..., None, :-1] @ h).squeeze(-2) * spreads[0] * spreads[1]
        return super().forward(q, k) + outputs.sum(dim=-2, keepdim=True)


def latencies() -> dict[str, float]:
    """Return the milliseconds of each form of the estimate, in ONNX Runtime."""
    samples = Samples({name: torch.randn(2, HEADS, LENGTH, SIZE) for name in "qk"})
    runners = {}
    with tempfile.TemporaryDirectory() as folder:
        modules = {
            "parabolas": Parabolas(),
            "hinges": Hinges(),
            "compelled or freed": Networks(),
            "8 slices": Slices(8),
            "32 random slices": Slices(32),
        }
        for name, module in modules.items():
            runners[name] = onnx_runner(module, samples, Path(folder))
    return {run.name: round(run.p50_ms, 3) for run in measure(runners, samples, 1, 5.0)}


if __name__ == "__main__":
    main()
