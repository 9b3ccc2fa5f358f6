"""Other ways to estimate the first dual than the one that ships, on trained teachers.

    python -m benchmarks.teachers                  # trains the teachers, once
    python -m benchmarks.fits
    python -m benchmarks.fits --only 'digits*seed0'

From the same features of the keys: ridge on the dual (what ships), the same linear map trained on the divergence
between plans or on the error of the attention output, and a small network for each head. By ridge, from other features:
sorted slices along balanced or random directions, each beside its parabolas. None of these has closure steps. And whole
operators from pairs and hinges, of no and of two closure steps: each map by ridge in its turn (what ships), all maps
trained jointly on the error of the output, and directions and knots with them. relc of the attention output on held-out
samples, the mean of the sites, and seconds for all of them. What is trained starts from ridge, and stops where it was
best on samples that it does not train on. Writes benchmarks/results/fits.json.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asapc.ops.c_transform import column_step, row_step
from asapc.ops.sinkhorn import sinkhorn_duals
from asapc.ops.sliced_dual import SlicedDual, target_dual
from asapc.passes.layout import site_inputs
from asapc.passes.record import record
from asapc.planning.activations import Activations, activation
from asapc.planning.calibrate import FitKey, calibrate, regressions, to_dtype
from asapc.planning.propose import split, truncate
from asapc.planning.ridge import fit
from asapc.types.choices import FeatureSet, Side, SlicedDualParams
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Axis, Site
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.teachers import studied

RESULTS = Path(__file__).resolve().parent / "results" / "fits.json"
DIRECTIONS = ("query_basis", "key_basis", "knots")
HELD_OUT, SLICES, HIDDEN = 32, 8, 16
STEPS, BATCH, LEARNING_RATE, LOOK_EVERY = 150, 8, 1e-2, 25


class Part(NamedTuple):
    """Some samples of a site: features (B, H, F, M), target (B, H, M), scores, plan, points, values and output."""

    features: Tensor
    target: Tensor
    scores: Tensor
    plan: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor


def main() -> None:
    """Compare on every teacher, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of teachers, as in a shell")
    only = parser.parse_args().only
    torch.set_flush_denormal(True)
    rows = []
    for name, teacher in studied(only):
        graph, sites, calibration, held_out = teacher.graph, teacher.sites, teacher.calibration, teacher.held_out
        errors, seconds = defaultdict(list), defaultdict(float)
        for site in sites:
            selection, fitting = split(calibration)
            for way, error, took in compare(graph, site, fitting, selection, held_out[:HELD_OUT]):
                errors[way].append(error)
                seconds[way] += took
        row = {way: {"relc": fmean(errors[way]), "seconds": round(seconds[way], 2)} for way in errors}
        rows.append({"teacher": name, "ways": row})
        print(f"{name:<34}", "  ".join(f"{way} {result['relc']:.4f}" for way, result in row.items()), flush=True)
    write_json(RESULTS, {"rows": rows, "environment": environment(seed=0)})


def compare(
    graph: CapturedGraph, site: Site, fitting: Samples, selection: Samples, held_out: Samples
) -> Iterator[tuple[str, float, float]]:
    """Yield ways to estimate a site's dual: name, relc on held-out samples, seconds."""
    torch.manual_seed(0)
    features = FeatureSet(pieces=8)
    shipped = calibrate(graph, {site.name: [features]}, [site], fitting, selection, 0)[FitKey(site.name, features)]
    start = time.perf_counter()
    unfitted = replace(shipped, weights=())
    fit_part, selection_part, judged = (part(graph, site, unfitted, s) for s in (fitting, selection, held_out))
    ridge = shipped.weights[0].double()
    yield "ridge", relc(judged, linear(ridge, judged.features)), time.perf_counter() - start
    parts = (fit_part, selection_part, judged)
    spread = fit_part.features.std(dim=(0, 3))
    for way, loss in {"plan": divergence, "output": output_error}.items():
        yield (f"ridge, then {way}", *train(Linear(ridge, spread), loss, *parts))
    yield (f"network of {HIDDEN}", *train(Network(ridge, spread), dual_error, *parts))
    directions = {
        "balanced": (shipped.query_basis.double(), shipped.key_basis.double()),
        "random": random_directions(site, site.head_dim or 1),
    }
    for way, bases in directions.items():
        start = time.perf_counter()
        error = of_slices(graph, site, bases, SLICES, (fitting, selection, held_out))
        yield f"{way} slices and parabolas", error, time.perf_counter() - start
    paired = FeatureSet(pieces=8, paired=True)
    fitted = calibrate(graph, {site.name: [paired]}, [site], fitting, selection, 2)[FitKey(site.name, paired)]
    for steps in (0, 2):
        greedy = truncate(fitted, steps)
        yield f"pairs, {steps} steps", relc(judged, Operator(greedy, site.loop.last, (), fit_part)(judged)), 0.0
        for way, names in {"jointly": (), "with directions": DIRECTIONS}.items():
            operator = Operator(greedy, site.loop.last, ("weights", *names), fit_part)
            yield f"pairs, {steps} steps, {way}", *train(operator, output_error, *parts)


def random_directions(site: Site, count: int) -> tuple[Tensor, Tensor]:
    """Return bases (H, D, count) of queries and keys: rotations side by side, in which scores are sums."""
    size = site.head_dim or 1
    rotations = [
        torch.linalg.qr(torch.randn(site.loop.heads, size, size))[0].double() for _ in range(-(-count // size))
    ]
    basis = torch.cat(rotations, dim=-1)[..., :count]
    scale = torch.ones(()) if site.wiring.product is None else site.wiring.product.score_scale.double()
    return basis, basis * scale.view(-1, 1, 1)


def of_slices(
    graph: CapturedGraph, site: Site, bases: tuple[Tensor, Tensor], slices: int, parts: tuple[Samples, ...]
) -> float:
    """Return relc on the last samples of a ridge on slices of the first coordinates, and parabolas in all of them."""
    fitting, selection, held_out = parts
    params = fitted_slices(graph, site, bases, slices, fitting, selection)
    judged = part(graph, site, replace(params, weights=()), held_out)
    return relc(judged, linear(params.weights[0], judged.features))


def fitted_slices(
    graph: CapturedGraph,
    site: Site,
    bases: tuple[Tensor, Tensor],
    slices: int,
    fitting: Samples,
    selection: Samples,
    side: Side = "keys",
) -> SlicedDualParams:
    """Fit the dual of one side of a site to slices along the first of some directions, and parabolas along all."""
    bare = SlicedDualParams(*bases, slices, torch.zeros(site.loop.heads, 0, 0), side=side)
    key = FitKey(site.name, FeatureSet(slices, side=side))
    problems = [regressions([site], {key: bare}, activations(graph, site, s))[key] for s in (fitting, selection)]
    return replace(bare, weights=(fit(*problems),))


def activations(graph: CapturedGraph, site: Site, samples: Samples) -> Iterator[Activations]:
    """Yield what the fit sees of a site."""
    values = record(graph.program.module(), samples, {operand.node for operand in site.wiring.operands})
    yield {site.name: activation(site, values)}


def part(graph: CapturedGraph, site: Site, params: SlicedDualParams, samples: Samples) -> Part:
    """Return all that a fit, of any kind, needs of some samples, in float64."""
    values = record(graph.program.module(), samples, {operand.node for operand in site.wiring.operands})
    applied = site_inputs(site, [values[operand.node].double() for operand in site.wiring.operands], None).values
    assert applied is not None
    scores, queries, keys = activation(site, values)
    bases = params.query_basis.double(), params.key_basis.double()
    params = SlicedDualParams(*bases, params.slices, params.knots.double())
    features = SlicedDual(params, site.loop.last).vectors(scores, queries, keys)
    f, g = sinkhorn_duals(scores, site.loop.half_steps)
    plan = torch.exp(scores + f.unsqueeze(-1) + g.unsqueeze(-2))
    target = target_dual(scores, site.loop.half_steps, "keys", site.loop.last)
    centred = [x - x.mean(dim=-1, keepdim=True) for x in (features, target)]
    return Part(centred[0], centred[1], scores, plan, queries, keys, applied, plan @ applied)


def linear(weights: Tensor, features: Tensor) -> Tensor:
    """Return the estimate (B, H, M) by one linear map a head."""
    return torch.einsum("hf,bhfm->bhm", weights, features)


class Operator(nn.Module):
    """A sliced dual of the keys' side, to be trained in what is named, each by how it differs from its start."""

    def __init__(self, params: SlicedDualParams, last: Axis, trained: Sequence[str], part: Part) -> None:
        super().__init__()
        self.params, self.last = to_dtype(params, torch.float64), last
        tensors = {name: [getattr(self.params, name)] for name in DIRECTIONS} | {"weights": [*self.params.weights]}
        self.start = {name: tensors[name] for name in trained}
        vectors = SlicedDual(self.params, last).vectors(part.scores, part.queries, part.keys)
        self.spread = vectors.std(dim=(0, 3))
        self.shifts = nn.ParameterDict(
            {name: nn.ParameterList(torch.zeros_like(t) for t in of_name) for name, of_name in self.start.items()}
        )

    def scale(self, name: str, tensor: Tensor) -> Tensor:
        """Return what a shift of one stands for."""
        return 1 / self.spread[:, : tensor.shape[-1]] if name == "weights" else tensor.abs().mean()

    def forward(self, part: Part) -> Tensor:
        """Return the last estimate of the dual, (B, H, M)."""
        moved = {
            name: [t + shift * self.scale(name, t) for t, shift in zip(of_name, self.shifts[name], strict=True)]
            for name, of_name in self.start.items()
        }
        weights = tuple(moved.pop("weights", self.params.weights))
        params = replace(self.params, **{name: t for name, [t] in moved.items()}, weights=weights[:-1])
        vectors: Tensor = SlicedDual(params, self.last).vectors(part.scores, part.queries, part.keys)
        return linear(weights[-1], vectors - vectors.mean(dim=-1, keepdim=True))


class Linear(nn.Module):
    """A linear map a head, by how it differs from the one that it starts from."""

    def __init__(self, weights: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.weights, self.spread = weights, spread
        self.shift = nn.Parameter(torch.zeros_like(weights))

    def forward(self, part: Part) -> Tensor:
        """Return an estimate of the dual, (B, H, M)."""
        return linear(self.weights + self.shift / self.spread, part.features)


class Network(nn.Module):
    """One hidden layer a head, beside the linear map that it starts from."""

    def __init__(self, weights: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.weights, self.spread = weights, spread
        heads, features = weights.shape
        self.into = nn.Parameter(torch.randn(heads, HIDDEN, features, dtype=weights.dtype) / features**0.5)
        self.out = nn.Parameter(torch.zeros(heads, HIDDEN, dtype=weights.dtype))

    def forward(self, part: Part) -> Tensor:
        """Return an estimate of the dual, (B, H, M)."""
        hidden = torch.tanh(torch.einsum("hcf,bhfm->bhcm", self.into / self.spread.unsqueeze(1), part.features))
        return linear(self.weights, part.features) + linear(self.out, hidden)


def closed(part: Part, dual: Tensor) -> Tensor:
    """Return the logarithm of the plan that is rebuilt from an estimate of the keys' dual."""
    g = column_step(part.scores, row_step(part.scores, dual))
    return F.log_softmax(part.scores + g.unsqueeze(-2), dim=-1)


def dual_error(part: Part, dual: Tensor) -> Tensor:
    """Return the mean squared error of a dual, up to a constant."""
    return (dual - dual.mean(dim=-1, keepdim=True) - part.target).square().mean()


def divergence(part: Part, dual: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of the rebuilt plan from the teacher's."""
    return -(part.plan * closed(part, dual)).sum(dim=-1).mean()


def output_error(part: Part, dual: Tensor) -> Tensor:
    """Return the squared relative error of the attention output."""
    centred = part.output - part.output.mean(dim=-2, keepdim=True)
    return (closed(part, dual).exp() @ part.values - part.output).square().sum() / centred.square().sum()


def relc(part: Part, dual: Tensor) -> float:
    """Return the error of the attention output over the norm of the teacher's, less its mean over the tokens."""
    with torch.no_grad():
        return output_error(part, dual).sqrt().item()


def train(
    estimate: nn.Module,
    loss: Callable[[Part, Tensor], Tensor],
    fitted: Part,
    selection: Part,
    judged: Part,
) -> tuple[float, float]:
    """Train a map by Adam; error on the judged samples where that on the selection was least, and seconds."""
    start = time.perf_counter()
    optimizer = torch.optim.Adam(estimate.parameters(), LEARNING_RATE)

    def errors() -> tuple[float, float]:
        with torch.no_grad():
            return relc(selection, estimate(selection)), relc(judged, estimate(judged))

    best = errors()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        start_of_batch = step * BATCH % len(fitted.target)
        batch = Part(*(tensor[start_of_batch : start_of_batch + BATCH] for tensor in fitted))
        loss(batch, estimate(batch)).backward()
        optimizer.step()
        if step % LOOK_EVERY == 0:
            best = min(best, errors())
    return best[1], time.perf_counter() - start


if __name__ == "__main__":
    main()
