"""A language model with hyper-connections, whole: what its loops take, and what shorter ones cost it.

    python -m benchmarks.tiny_model
    python -m benchmarks.tiny_model --quick    # a moment, writes nothing

models/language.pt with its length open, in ONNX Runtime: as written, with exact forms packed and interleaved, with
truncated loops, with networks before few half-steps, with what budgets select layer by layer, and without any half-
step, the floor: the softmax before the loop is the plan. Calls on few characters stand for decoding, without a cache of
keys, and on many for prefill. Perplexities are of all held-out texts. For what hyper-connections promise, that signals
neither grow nor vanish, the plans of all layers are multiplied token by token. Ratios are medians of interleaved rounds
in one process; 95 % intervals of them are bootstrapped over rounds, those of perplexity over texts. A run that was
stopped goes on where it was. Writes benchmarks/results/tiny_model.json and a part of docs/hyper-connections.md.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
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
from asapc.capturing.dynamic import parse_axes
from asapc.capturing.export import export
from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.loading.model import load_model
from asapc.models import language
from asapc.ops.small import SmallSinkhorn
from asapc.planning.alternatives import look_up
from asapc.planning.amortise import FOLLOWING, WIDTHS
from asapc.planning.choose import decide
from asapc.planning.costs import shipped
from asapc.planning.operators import MANY, build
from asapc.timing.rounds import time_rounds
from asapc.types.choices import Candidate
from asapc.types.graph import CapturedGraph
from asapc.types.options import Lowering
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.report import candidate_data
from asapc.writing.words import kind
from benchmarks.generated import replace_generated
from benchmarks.intervals import CONFIDENCE, median_ratio
from benchmarks.progress import Progress
from benchmarks.tiny import CONSTANT, DOCUMENT, GUARD, ITERATIONS, RESAMPLES, SEED, Rewritten

ROOT = Path(__file__).resolve().parent
MODEL, RESULTS = ROOT.parent / "models" / "language.pt", ROOT / "results" / "tiny_model.json"
OPEN = "batch=1:32,seq=1:128"
SHAPES = ((1, 1), (1, 16), (1, 128), (32, 128))  # texts, characters
ALL, TRUNCATED = 2 * ITERATIONS - 1, (2, 3, 4, 6, 8, 12, 16, 24)  # half-steps
BUDGETS = ("output-error<=0.001", "output-error<=0.01", "output-error<=0.05")
SECONDS, MIN_ROUNDS, TEXTS = 10.0, 20, 32  # texts at once, for perplexity
LIMIT = 1e-3  # by which perplexity may grow
FEW_TOKENS = 16
WRITTEN, EXACT, OTHER, NO_STEP = "as written", "exact", "exact, in the other layout", "no half-step"
LAYOUTS: Mapping[Lowering, str] = {"materialised": "packed", "interleaved": "interleaved"}

Row = dict[str, Any]
Plan = Callable[[Tensor], Tensor]  # from scores (texts, characters, S, S) to plans


class Unscaled(nn.Module):
    """No half-step at all: what the loop starts from is the plan."""

    def forward(self, scores: Tensor) -> Tensor:
        """Map scores (texts, characters, S, S) to plans of the same shape."""
        return scores.softmax(-1) + CONSTANT


class Variant(nn.Module):
    """The language model with other loops in its layers."""

    def __init__(self, model: nn.Module, plans: Iterable[nn.Module]) -> None:
        """Put a module in the place of each layer's loop."""
        super().__init__()
        self.model, self.plans = model, nn.ModuleList(plans)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (texts, characters) to logits (texts, characters, V)."""
        return run(self.model, tokens, self.plans)[0]


def loop_of(half_steps: int, lowering: Lowering) -> nn.Module:
    """Return the loop of published hyper-connections, its softmax included, with so many half-steps after it."""
    if half_steps == 0:
        return Unscaled()
    return Rewritten(SmallSinkhorn(half_steps, "columns", (4, 4), GUARD, None, torch.ones(1), lowering))


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

    with patch.object(language, "sinkhorn", loop):
        logits = model(tokens)
    return logits, torch.stack(scores).flatten(1, 2), torch.stack(results).flatten(1, 2)


def main() -> None:
    """Measure all of it, print, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short calls and few texts; writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator; 1 by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            data = measure(Progress("", Path(folder)), SHAPES[:2], 0.1, TEXTS, options.threads, quick=True)
        print(*document(data), sep="\n")
        return
    progress = Progress("tiny_model")
    data = measure(progress, SHAPES, SECONDS, None, options.threads)
    write_json(RESULTS, {**data, "threads": options.threads, "environment": environment(SEED)})
    replace_generated(DOCUMENT, document(data), "model")
    progress.finish()


def measure(
    progress: Progress,
    shapes: Sequence[tuple[int, int]],
    seconds: float,
    texts: int | None,
    threads: int,
    quick: bool = False,
) -> Row:
    """Return what is not known yet, and what is, on so many texts; all of them with None."""
    models = Models(progress, threads, quick)
    tokens = models.held_out.inputs["tokens"][:texts]
    return {
        "operators": models.described,
        "fidelity": [
            progress.get(f"fidelity {name}", partial(perplexity, models, name, tokens)) for name in models.names
        ],
        "latency": [
            progress.get(f"latency {batch} {length}", partial(compare, models, tokens[:batch, :length], seconds))
            for batch, length in shapes
        ],
        "products": [progress.get(f"products {name}", partial(product, models, name, tokens)) for name in models.names],
    }


def select() -> dict[str, list[tuple[Site, Candidate]]]:
    """Return the sites of all layers with their networks, and with what budgets select for them, by name."""
    config, teacher = CompileConfig(), study(MODEL)
    with look_up(teacher, config, shipped(), None, lambda detail: None) as check:
        of_sites = check.alternatives.candidates
        networks = {site: [c for c in of_sites[site.name] if c.operator == "amortised"] for site in teacher.sites}
        names = [f"network of {width}, {steps}" for width in WIDTHS for steps in FOLLOWING]
        chosen = {
            name: [(site, of_site[number]) for site, of_site in networks.items()] for number, name in enumerate(names)
        }
        for budget in BUDGETS:
            choices = decide(check, replace(config, fidelity=(budget,))).choices
            chosen[budget] = [(site, choices[site.name].candidate) for site in teacher.sites]
    return chosen


class Models:
    """The model in all its variants, exported when they are asked for.

    Args:
        progress: keeps files and half-steps.
        threads: of each session.
        quick: few variants, and none of a budget.
    """

    def __init__(self, progress: Progress, threads: int, quick: bool = False) -> None:
        self.progress, self.threads = progress, threads
        loaded = load_model(MODEL)
        self.module, self.held_out, self.layers = loaded.module, loaded.held_out, len(loaded.module.blocks)
        self.runners: dict[tuple[str, Lowering], OnnxRuntimeRunner] = {}
        truncated = TRUNCATED[2:3] if quick else TRUNCATED
        alike = {EXACT: ALL, **{f"truncated, {count}": count for count in truncated}, NO_STEP: 0}
        self.half_steps = {name: [count] * self.layers for name, count in alike.items()}
        self.chosen = {} if quick else select()

    @property
    def names(self) -> list[str]:
        """The names of the variants."""
        return [WRITTEN, *self.half_steps, *self.chosen]

    @property
    def described(self) -> dict[str, list[str]]:
        """What stands at each layer, by the name of the variant."""
        loops = {name: [f"{count} half-steps" for count in counts] for name, counts in self.half_steps.items()}
        return loops | {name: [kind(candidate_data(c)) for _, c in chosen] for name, chosen in self.chosen.items()}

    def runner(self, name: str, lowering: Lowering) -> OnnxRuntimeRunner:
        """Return the session of a variant."""
        key: tuple[str, Lowering] = name, "materialised" if name == WRITTEN else lowering
        if key not in self.runners:
            path = self.progress.folder / f"{' '.join(key)}.onnx"
            if not path.is_file():
                module = self.module if name == WRITTEN else Variant(self.module, self.loops(name, lowering))
                export_open(module, self.held_out, path)
            self.runners[key] = OnnxRuntimeRunner(path, self.threads, name)
        return self.runners[key]

    def loops(self, name: str, lowering: Lowering) -> list[nn.Module]:
        """Return the loops of a variant, layer by layer."""
        if name in self.half_steps:
            return [loop_of(count, lowering) for count in self.half_steps[name]]
        operators = [build(site, replace(candidate, lowering=lowering)) for site, candidate in self.chosen[name]]
        return [Rewritten(operator) for operator in operators]

    @cached_property
    def expected(self) -> Tensor:
        """The logits of the model as written on all held-out texts."""
        return self.logits(WRITTEN, self.held_out.inputs["tokens"])

    def logits(self, name: str, tokens: Tensor) -> Tensor:
        """Return the logits (texts, characters, V) of a variant."""
        runner = self.runner(name, "interleaved")
        return torch.cat([runner(batch)[0] for batch in batches(tokens)])


def export_open(module: nn.Module, samples: Samples, path: Path) -> None:
    """Export a variant with open axes."""
    axes = parse_axes(OPEN, samples[:2])
    export_onnx(CapturedGraph(export(module.eval(), samples[:2].inputs, axes), samples[:2], axes=axes), path, {})


def layout(tokens: int) -> Lowering:
    """Return the layout that asapc takes for so many small plans on a CPU."""
    return "interleaved" if tokens >= MANY else "materialised"


def perplexity(models: Models, name: str, tokens: Tensor) -> Row:
    """Return the perplexity of a variant on texts (texts, characters), and how far it is from that as written."""
    own, teacher = models.logits(name, tokens), models.expected[: len(tokens)]
    of_texts = losses(own, tokens)
    return {
        "name": name,
        "perplexity": math.exp(of_texts.mean()),
        "change": growth(of_texts, losses(teacher, tokens)),
        "error": ((own - teacher).norm() / teacher.norm()).item(),
    }


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
    return row


def product(models: Models, name: str, tokens: Tensor) -> Row:
    """Return what the plans of all layers, multiplied token by token, do to signals in a variant of the model.

    The largest singular value is the most that the streams as a whole can grow. A sum of a row is the gain of a signal
    that all streams share, one of a column that of its gradient (arXiv 2512.24880). In float64, least and largest of
    all tokens.
    """
    plans = None if name == WRITTEN else models.loops(name, "materialised")
    with torch.no_grad():
        of_batches = [run(models.module, batch.inputs["tokens"], plans)[2] for batch in batches(tokens)]
    factors = torch.cat(of_batches, dim=1).double()
    result = factors[0]
    for factor in factors[1:]:
        result = factor @ result
    values = {
        "singular value": torch.linalg.matrix_norm(result, 2),
        "row sum": result.sum(-1),
        "column sum": result.sum(-2),
    }
    return {"name": name, **{kind: [v.amin().item(), v.amax().item()] for kind, v in values.items()}}


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
    yield from conclusion(data)
    yield ""
    yield "| all layers' plans, multiplied | largest singular value | sums of rows | sums of columns |"
    yield "|---|---:|---:|---:|"
    for row in data["products"]:
        cells = ["{:.4f} to {:.4f}".format(*row[kind]) for kind in ("singular value", "row sum", "column sum")]
        yield f"| {row['name']} | {' | '.join(cells)} |"


def with_interval(ratio: Sequence[float]) -> str:
    """Format a ratio and its interval."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def conclusion(data: Row) -> Iterator[str]:
    """Yield which truncated loop, and which network, keeps perplexity and is fastest on few tokens, as a list."""
    (few,) = [row for row in data["latency"] if row["texts"] * row["characters"] == FEW_TOKENS]
    for form in ("truncated", "network"):
        kept = [
            row["name"]
            for row in data["fidelity"]
            if row["name"].startswith(form) and max(map(abs, row["change"])) <= LIMIT
        ]
        if not kept:
            yield f"- No {form} variant keeps perplexity within {LIMIT:.1%}, the interval included."
            continue
        best = max(kept, key=lambda name: few["times_exact"][name][0])
        gains = [
            f"{with_interval(row['times_exact'][best])} on {row['texts'] * row['characters']:,} tokens"
            for row in data["latency"]
        ]
        yield (
            f"- *{best}* is the fastest {form} variant that keeps perplexity within {LIMIT:.1%}, the interval "
            f"included: {', '.join(gains)}, times as fast as exact."
        )


if __name__ == "__main__":
    main()
