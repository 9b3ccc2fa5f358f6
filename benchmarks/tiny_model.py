"""A language model with hyper-connections, whole: what its loops take, and what shorter ones cost it.

    python -m benchmarks.tiny_model
    python -m benchmarks.tiny_model --quick    # a moment, writes nothing

models/language.pt with its length open, in ONNX Runtime: as written, with exact forms packed and interleaved, with
truncated loops, with what budgets select, and without Sinkhorn, the floor: with no half-step, so that the softmax
before the loop is the plan, and unmixed, so that the plan is the identity and even its scores are not computed. Calls
on few characters stand for decoding, without a cache of keys, and on many for prefill. Perplexities are of all held-out
texts. For what hyper-connections promise, that signals neither grow nor vanish, the plans of all layers are multiplied
token by token. Ratios are medians of interleaved rounds in one process; 95 % intervals of them are bootstrapped over
rounds, those of perplexity over texts. Writes benchmarks/results/tiny_model.json and a part of
docs/hyper-connections.md.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from torch import Tensor, nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.models import language
from asapc.ops.small import SmallSinkhorn
from asapc.planning.alternatives import look_up
from asapc.planning.choose import decide
from asapc.planning.costs import shipped
from asapc.planning.operators import MANY, exact_operator
from asapc.timing.rounds import time_rounds
from asapc.types.options import Lowering
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.rewrite import rewrite
from benchmarks.generated import replace_generated
from benchmarks.intervals import CONFIDENCE, median_ratio
from benchmarks.tiny import CONSTANT, DOCUMENT, GUARD, ITERATIONS, RESAMPLES, SEED

ROOT = Path(__file__).resolve().parent
MODEL, RESULTS = ROOT.parent / "models" / "language.pt", ROOT / "results" / "tiny_model.json"
OPEN = "batch=1:32,seq=1:128"
SHAPES = ((1, 1), (1, 16), (1, 128), (32, 128))  # texts, characters
TRUNCATED, BUDGETS = (2, 3, 4, 6, 8, 12, 16, 24), ("output-error<=0.001", "output-error<=0.01", "output-error<=0.05")
SECONDS, MIN_ROUNDS, TEXTS = 10.0, 20, 32  # texts at once, for perplexity
LIMIT = 1e-3  # by which perplexity may grow
WRITTEN, EXACT, OTHER = "as written", "exact", "exact, in the other layout"
NO_STEP, UNMIXED = "no half-step", "unmixed"
LAYOUTS: Mapping[Lowering, str] = {"materialised": "packed", "interleaved": "interleaved"}

Row = dict[str, Any]
Plan = Callable[[Tensor], Tensor]  # from scores (texts, characters, S, S) to plans


class NoStep(SmallSinkhorn):
    """A loop without any half-step: its kernel is the plan."""

    def scale(self, kernel: Tensor, first: Tensor) -> Tensor:
        """Return the kernel."""
        return kernel


class Unmixed(nn.Module):
    """The identity as the plan."""

    lowering = "materialised"

    def forward(self, scores: Tensor, queries: Tensor | None, keys: Tensor | None, values: Tensor) -> Tensor:
        """Return the values."""
        return values


def main() -> None:
    """Measure all of it, print, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short call and few texts; writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator; 1 by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes, seconds, texts = (SHAPES[:2], 0.1, TEXTS) if options.quick else (SHAPES, SECONDS, None)
    teacher = study(MODEL, CompileConfig(dynamic=OPEN))
    tokens = teacher.held_out.inputs["tokens"][:texts]
    half_steps = select(teacher)
    print(half_steps, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(teacher, half_steps, Path(folder), options.threads)
        data: Row = {
            "half_steps": half_steps,
            "fidelity": list(perplexities(models, tokens)),
            "latency": [compare(models, tokens[:batch, :length], seconds) for batch, length in shapes],
            "products": list(products(teacher.loaded.module, half_steps, tokens)),
        }
    if not options.quick:
        write_json(RESULTS, {**data, "threads": options.threads, "environment": environment(SEED)})
        replace_generated(DOCUMENT, document(data), "model")


def select(teacher: Teacher) -> dict[str, list[int]]:
    """Return the half-steps at each layer by the name of the variant: truncated alike, or as a budget selects."""
    layers = len(teacher.sites)
    half_steps = {EXACT: [teacher.sites[0].loop.half_steps] * layers}
    half_steps |= {f"truncated, {steps}": [steps] * layers for steps in TRUNCATED}
    config = CompileConfig(dynamic=OPEN)
    with look_up(teacher, config, shipped(), None, lambda detail: None) as check:
        for budget in BUDGETS:
            choices = decide(check, replace(config, fidelity=(budget,))).choices
            half_steps[budget] = [choices[site.name].candidate.half_steps for site in teacher.sites]
    return half_steps


class Models:
    """The model in all its variants, exported when they are asked for.

    Args:
        teacher: the model, its length open.
        half_steps: at each layer, by the variant's name.
        folder: for the files.
        threads: of each session.
    """

    def __init__(self, teacher: Teacher, half_steps: Mapping[str, Sequence[int]], folder: Path, threads: int) -> None:
        self.teacher, self.half_steps, self.folder, self.threads = teacher, half_steps, folder, threads
        self.runners: dict[tuple[str, Lowering], OnnxRuntimeRunner] = {}

    @property
    def names(self) -> list[str]:
        """The names of the variants."""
        return [WRITTEN, *self.half_steps, NO_STEP, UNMIXED]

    def runner(self, name: str, lowering: Lowering) -> OnnxRuntimeRunner:
        """Return the session of a variant."""
        key = name, "materialised" if name in (WRITTEN, UNMIXED) else lowering
        if key not in self.runners:
            sites = self.teacher.open_sites
            program = rewrite(self.teacher.open_graph, sites, self.modules(name, lowering))
            path = export_onnx(program, self.folder / f"{len(self.runners)}.onnx", {}).path
            self.runners[key] = OnnxRuntimeRunner(path, self.threads, name)
        return self.runners[key]

    def modules(self, name: str, lowering: Lowering) -> dict[str, nn.Module]:
        """Return the operators of a variant, by the site's name."""
        sites = self.teacher.open_sites
        if name == WRITTEN:
            return {}
        if name == UNMIXED:
            return {site.name: Unmixed() for site in sites}
        if name == NO_STEP:
            return {site.name: no_step(site, lowering) for site in sites}
        return {
            site.name: exact_operator(site, steps, lowering=lowering)
            for site, steps in zip(sites, self.half_steps[name], strict=True)
        }


def no_step(site: Site, lowering: Lowering) -> NoStep:
    """Return what leaves a site without any half-step."""
    loop = site.loop
    return NoStep(1, loop.last, (loop.queries, loop.keys), loop.guard, lowering=lowering)


def layout(tokens: int) -> Lowering:
    """Return the layout that asapc takes for so many small plans on a CPU."""
    return "interleaved" if tokens >= MANY else "materialised"


def perplexities(models: Models, tokens: Tensor) -> Iterator[Row]:
    """Yield the perplexity of each variant on texts (texts, characters), and how far it is from that as written."""
    logits = {name: logits_of(models.runner(name, "interleaved"), tokens) for name in models.names}
    teacher = logits[WRITTEN]
    expected = losses(teacher, tokens)
    for name, of_variant in logits.items():
        own = losses(of_variant, tokens)
        error = ((of_variant - teacher).norm() / teacher.norm()).item()
        row = {"name": name, "perplexity": math.exp(own.mean()), "change": growth(own, expected), "error": error}
        print(row, flush=True)
        yield row


def logits_of(runner: OnnxRuntimeRunner, tokens: Tensor) -> Tensor:
    """Return the logits (texts, characters, V) of texts."""
    return torch.cat([runner(batch)[0] for batch in batches(tokens)])


def batches(tokens: Tensor) -> Iterator[Samples]:
    """Yield texts, some at a time."""
    return Samples({"tokens": tokens}).batches(TEXTS)


def losses(logits: Tensor, tokens: Tensor) -> np.ndarray:
    """Return the mean cross-entropy of each text, in nats a character."""
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.unflatten(0, (len(tokens), -1)).double().mean(dim=1).numpy()


def growth(own: np.ndarray, expected: np.ndarray) -> list[float]:
    """Return by what share perplexity grows, from losses of the same texts, and the ends of its interval."""
    if np.array_equal(own, expected):
        return [0.0, 0.0, 0.0]
    interval = bootstrap(
        (own - expected,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=SEED,
    ).confidence_interval
    return [math.expm1(float(value)) for value in ((own - expected).mean(), interval.low, interval.high)]


def compare(models: Models, tokens: Tensor, seconds: float) -> Row:
    """Time all variants on texts (texts, characters), in the layout for so many tokens; the exact form in both."""
    best, samples = layout(tokens.numel()), Samples({"tokens": tokens})
    runners = {name: models.runner(name, best) for name in models.names}
    (other,) = {*LAYOUTS} - {best}
    runners[OTHER] = models.runner(EXACT, other)
    times = time_rounds(runners, samples, len(tokens), seconds, SEED, MIN_ROUNDS)
    row: Row = {"texts": len(tokens), "characters": tokens.shape[1], "layout": LAYOUTS[best]}
    row["rounds"] = len(times[WRITTEN])
    row["ms"] = {name: float(np.median(ms)) for name, ms in times.items()}
    for key, base in (("times_written", WRITTEN), ("times_exact", EXACT)):
        row[key] = {
            name: list(median_ratio(times[base], ms, SEED, RESAMPLES)) for name, ms in times.items() if name != base
        }
    print(row, flush=True)
    return row


def run(model: nn.Module, tokens: Tensor, plans: Sequence[Plan] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model as it is in torch, or with another loop at each layer.

    Args:
        model: the language model.
        tokens: (texts, characters).
        plans: the loops of all layers; None for the model's own.

    Returns:
        Its logits (texts, characters, V), and the scores and plans of all layers (layers, texts * characters, S, S).
    """
    own = language.sinkhorn
    scores: list[Tensor] = []
    results: list[Tensor] = []

    def loop(of_layer: Tensor, iterations: int, constant: float) -> Tensor:
        plan = partial(own, iterations=iterations, constant=constant) if plans is None else plans[len(scores)]
        scores.append(of_layer)
        results.append(plan(of_layer))
        return results[-1]

    with patch.object(language, "sinkhorn", loop), torch.no_grad():
        logits = model(tokens)
    return logits, torch.stack(scores).flatten(1, 2), torch.stack(results).flatten(1, 2)


def loop_of(half_steps: int) -> Plan:
    """Return the loop of published hyper-connections with fewer half-steps, none with 0."""
    operator = SmallSinkhorn(half_steps, "columns", (4, 4), GUARD, None, torch.ones(1)) if half_steps else None

    def plan(scores: Tensor) -> Tensor:
        kernel = scores.softmax(-1) + CONSTANT
        return kernel if operator is None else operator.from_kernel(kernel)

    return plan


def products(model: nn.Module, half_steps: Mapping[str, Sequence[int]], tokens: Tensor) -> Iterator[Row]:
    """Yield what the plans of all layers, multiplied token by token, do to signals, each variant on what it computes.

    The largest singular value is the most that the streams as a whole can grow. A sum of a row is the gain of a signal
    that all streams share, one of a column that of its gradient (arXiv 2512.24880). In float64, least and largest of
    all tokens.
    """
    layers = len(half_steps[EXACT])
    for name, steps in {WRITTEN: None, **half_steps, NO_STEP: [0] * layers}.items():
        plans = None if steps is None else [loop_of(count) for count in steps]
        factors = torch.cat([run(model, batch.inputs["tokens"], plans)[2] for batch in batches(tokens)], dim=1).double()
        product = factors[0]
        for factor in factors[1:]:
            product = factor @ product
        values = {
            "singular value": torch.linalg.matrix_norm(product, 2),
            "row sum": product.sum(-1),
            "column sum": product.sum(-2),
        }
        row = {"name": name, **{kind: [v.amin().item(), v.amax().item()] for kind, v in values.items()}}
        print(row, flush=True)
        yield row


def document(data: Row) -> Iterator[str]:
    """Yield the lines of a part of the document."""
    latency, fidelity = data["latency"], {row["name"]: row for row in data["fidelity"]}
    calls = [f"{row['texts'] * row['characters']:,} ({row['layout']})" for row in latency]
    yield f"| us a token, in calls on so many | {' | '.join(calls)} | perplexity | change (95%) | outputs differ by |"
    yield f"|---|{'---:|' * len(calls)}---:|---:|---:|"
    for name, own in fidelity.items():
        times = [f"{1e3 * row['ms'][name] / (row['texts'] * row['characters']):.1f}" for row in latency]
        change = "" if name == WRITTEN else "{:+.3%} ({:+.3%} to {:+.3%})".format(*own["change"])
        yield f"| {name} | {' | '.join(times)} | {own['perplexity']:.4f} | {change} | {own['error']:.1e} |"
    yield ""
    yield f"| times as fast as exact (95%) | {' | '.join(calls)} |"
    yield f"|---|{'---:|' * len(calls)}"
    for name in [*fidelity, OTHER]:
        if name != EXACT:
            yield f"| {name} | {' | '.join(with_interval(row['times_exact'][name]) for row in latency)} |"
    yield ""
    yield conclusion(data)
    yield ""
    yield "| all layers' plans, multiplied | largest singular value | sums of rows | sums of columns |"
    yield "|---|---:|---:|---:|"
    for row in data["products"]:
        cells = ["{:.4f} to {:.4f}".format(*row[kind]) for kind in ("singular value", "row sum", "column sum")]
        yield f"| {row['name']} | {' | '.join(cells)} |"


def with_interval(ratio: Sequence[float]) -> str:
    """Format a ratio and its interval."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def conclusion(data: Row) -> str:
    """Say which truncated loop keeps perplexity, and what it gains."""
    close = [
        row["name"]
        for row in data["fidelity"]
        if row["name"].startswith("truncated") and max(map(abs, row["change"])) <= LIMIT
    ]
    if not close:
        return f"No truncated loop keeps perplexity within {LIMIT:.1%}."
    name = min(close, key=lambda name: data["half_steps"][name][0])
    gains = [
        f"{with_interval(row['times_exact'][name])} times as fast as with the exact form on "
        f"{row['texts'] * row['characters']:,} tokens"
        for row in data["latency"]
    ]
    return (
        f"{data['half_steps'][name][0]} half-steps of {2 * ITERATIONS - 1} are the fewest that keep perplexity within "
        f"{LIMIT:.1%}, the interval included. With them the model is {', '.join(gains)}."
    )


if __name__ == "__main__":
    main()
