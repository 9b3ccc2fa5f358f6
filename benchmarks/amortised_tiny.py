"""Networks in the place of half-steps on small plans, beside loops that are merely shorter, at equal time.

    python -m benchmarks.amortised_tiny
    python -m benchmarks.amortised_tiny --quick    # a moment, writes nothing

A ReLU network takes a token's 4 x 4 scores to the dual of its plan's rows; 1, 3 or 5 half-steps follow. Networks are
ordinary ones, ordinary ones with weights that rows and columns share, and compelled ones (`asapc.relu`: block-diagonal
layers of width 4). Each is trained for its half-steps on normal scores of three spreads, and on the scores of each
layer of models/language.pt on its calibration texts. It is judged on other scores: by the plan's error, and in the
language model, in all layers, by perplexity. A network's gain is how many times as fast it is as the shortest loop that
leaves no more error, in ONNX Runtime. The fastest loop and the fastest network that keep the perplexity are also timed
in the language model, whole. Ratios are medians of interleaved rounds in one process, with 95 % intervals by
bootstrap. Writes benchmarks/results/amortised_tiny.json and a part of docs/hyper-connections.md.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asapc.backends.onnxruntime.builder import export_onnx
from asapc.backends.onnxruntime.runner import OnnxRuntimeRunner
from asapc.capturing.export import export
from asapc.loading.model import load_model
from asapc.timing.rounds import time_rounds
from asapc.types.graph import CapturedGraph
from asapc.types.options import Lowering
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.dual_networks import ENTRIES, EXACT, KINDS, SIDE, Network, Timed, exact_plans, loop, plans
from benchmarks.generated import replace_generated
from benchmarks.intervals import median_ratio
from benchmarks.progress import Progress
from benchmarks.tiny import DOCUMENT, RESAMPLES, SEED
from benchmarks.tiny_model import (
    LIMIT,
    MODEL,
    SHAPES,
    Plan,
    Variant,
    batches,
    export_open,
    growth,
    layout,
    losses,
    run,
    with_interval,
)

RESULTS = Path(__file__).resolve().parent / "results" / "amortised_tiny.json"
SPREADS, TRAINING, JUDGES = (1.0, 2.0, 4.0), 32768, 8192  # of normal scores; tokens of each
TEXTS = 64  # of the language model, that judge
FOLLOWING = (1, 3, 5)  # half-steps after a network
LOOPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, EXACT)
STEPS, BATCH, RATE = 1000, 512, 6e-3
TOKENS, SECONDS, MIN_ROUNDS = (16, 4096), 3.0, 40
LOOP, OF_MODEL = "loop", "language model"
EXACTLY = f"{LOOP}, {EXACT}"
FORMS = [*((LOOP, steps) for steps in LOOPS), *((name, steps) for name in KINDS for steps in FOLLOWING)]
QUICK = [(LOOP, 4), (LOOP, EXACT), ("shared, 32", 1), ("compelled, 32", 1)]

Row = dict[str, Any]


class ScoreSets:
    """Scores (K, T, 16) to train on and others to judge by, with their exact plans."""

    def __init__(self, training: Tensor, judging: Tensor) -> None:
        self.training, self.judging = training, judging
        self.targets, self.expected = exact_plans(training), exact_plans(judging)

    def errors(self, results: Tensor) -> list[float]:
        """Return the errors of plans for the judging scores over the norm of the exact ones, for each set."""
        error, norm = (value.square().sum((1, 2)) for value in (results - self.expected, self.expected))
        return (error / norm).sqrt().tolist()


def train(network: Network, data: ScoreSets, half_steps: int, steps: int) -> Network:
    """Train networks to the exact plans, which so many half-steps after them are to come close to, and return them."""
    generator = torch.Generator().manual_seed(SEED)
    for phase in range(network.phases):
        if phase:
            network.free()
        optimizer = torch.optim.Adam(network.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps // network.phases)
        for _ in range(steps // network.phases):
            batch = torch.randint(data.training.shape[1], (BATCH,), generator=generator)
            differences = plans(network, data.training[:, batch], half_steps) - data.targets[:, batch]
            optimizer.zero_grad()
            differences.square().sum(dim=-1).mean(dim=1).sum().backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main() -> None:
    """Train, judge and time all networks and loops, print, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few networks, hardly trained; writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator; 1 by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            data = measure(
                Progress("", Path(folder)), Judge(4, 4, JUDGES), QUICK, TOKENS[:1], SHAPES[:1], options.threads
            )
        print(*document(data), sep="\n")
        return
    progress = Progress("amortised_tiny")
    data = measure(progress, Judge(STEPS, TEXTS, TRAINING), FORMS, TOKENS, SHAPES[1:], options.threads)
    write_json(RESULTS, {**data, "threads": options.threads, "environment": environment(SEED)})
    replace_generated(DOCUMENT, document(data), "networks")
    progress.finish()


def measure(
    progress: Progress,
    judge: "Judge",
    forms: Sequence[tuple[str, int]],
    tokens: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    threads: int,
) -> Row:
    """Return what is not known yet of networks and loops, and what is; whole models on texts of some shapes."""
    rows = [progress.get(f"{name}, {steps}", partial(judge, name, steps)) for name, steps in forms]
    times = {
        str(count): progress.get(f"{count} tokens", partial(time_forms, forms, count, threads)) for count in tokens
    }
    loops = [row for row in rows if row["name"] == LOOP]
    rows = [row | {"speed": {count: speed(row, loops, times[count]) for count in times}} for row in rows]
    ms = {count: {name: float(np.median(each)) for name, each in of.items()} for count, of in times.items()}
    rounds = {count: len(of[EXACTLY]) for count, of in times.items()}
    keepers = {EXACTLY: (LOOP, EXACT)} | {
        f"{row['name']}, {row['half_steps']}": (row["name"], row["half_steps"]) for row in fastest_that_keep(rows)
    }
    whole = [
        progress.get(f"whole {', '.join(keepers)}, {shape}", partial(time_models, judge, keepers, shape, threads))
        for shape in shapes
    ]
    return {"rows": rows, "ms": ms, "rounds": rounds, "whole": whole}


def fastest_that_keep(rows: Sequence[Row]) -> list[Row]:
    """Return the fastest loop and the fastest network that keep perplexity within the limit, the interval included."""
    kept = [row for row in rows if max(map(abs, row["perplexity"])) <= LIMIT]
    of_kinds = [[row for row in kept if (row["name"] == LOOP) == is_loop] for is_loop in (True, False)]
    return [max(rows, key=lambda row: list(row["speed"].values())[-1]["times_exact"][0]) for rows in of_kinds if rows]


def time_models(judge: "Judge", forms: Mapping[str, tuple[str, int]], shape: tuple[int, int], threads: int) -> Row:
    """Time the language model with some forms in all layers, on so many texts of so many characters."""
    texts, characters = shape
    samples, lowering = Samples({"tokens": judge.tokens[:texts, :characters]}), layout(texts * characters)
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, (kind, half_steps) in forms.items():
            path = Path(folder) / f"{name}.onnx"
            plans = [module_of(kind, half_steps, scores[None], lowering) for scores in judge.of_model.judging]
            export_open(Variant(judge.model, plans), Samples({"tokens": judge.tokens}), path)
            runners[name] = OnnxRuntimeRunner(path, threads)
        times = time_rounds(runners, samples, texts, SECONDS, SEED, MIN_ROUNDS)
    ratios = {name: list(median_ratio(times[EXACTLY], ms, SEED, RESAMPLES)) for name, ms in times.items()}
    return {
        "tokens": texts * characters,
        "ms": {n: float(np.median(ms)) for n, ms in times.items()},
        "times_exact": ratios,
    }


def module_of(name: str, half_steps: int, scores: Tensor, lowering: Lowering) -> nn.Module:
    """Return a loop, or a network with random weights for scores (1, T, 16), as a compiler would write it."""
    if name == LOOP:
        return loop(half_steps, lowering)
    kind, width = KINDS[name]
    network = kind(scores, width)
    network.free()
    return Timed(network, half_steps, lowering)


def time_forms(forms: Sequence[tuple[str, int]], tokens: int, threads: int) -> dict[str, list[float]]:
    """Return the times of loops, and of networks with random weights, on so many tokens, by `timed_as`."""
    generator = torch.Generator().manual_seed(SEED)
    scores, lowering = 2 * torch.randn(2, tokens, SIDE, SIDE, generator=generator), layout(tokens)
    modules: dict[str, nn.Module] = {}
    for name, half_steps in forms:
        modules[timed_as(name, half_steps)] = module_of(name, half_steps, scores[:1].flatten(-2), lowering)
    samples = Samples({"scores": scores})
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, module in modules.items():
            graph = CapturedGraph(export(module.eval(), samples.inputs), samples)
            runners[name] = OnnxRuntimeRunner(export_onnx(graph, Path(folder) / "model.onnx", {}).path, threads)
    return time_rounds(runners, samples, 1, SECONDS, SEED, MIN_ROUNDS)


def timed_as(name: str, half_steps: int) -> str:
    """Return under which name a form is timed: shared weights, written out, are those of an ordinary network."""
    return f"{name.replace('shared', 'ordinary')}, {half_steps}"


def speed(row: Row, loops: list[Row], times: Mapping[str, list[float]]) -> Row:
    """Return how many times as fast a row is as the exact loop, and a network as the shortest loop as close to it."""
    ms = times[timed_as(row["name"], row["half_steps"])]
    ratios: Row = {"times_exact": list(median_ratio(times[EXACTLY], ms, SEED, RESAMPLES))}
    if row["name"] != LOOP:
        ratios["loops"] = {
            scores: next((each["half_steps"] for each in loops if each["errors"][scores] <= error), EXACT)
            for scores, error in row["errors"].items()
        }
        ratios["gains"] = {
            scores: list(median_ratio(times[f"{LOOP}, {half_steps}"], ms, SEED, RESAMPLES))
            for scores, half_steps in ratios["loops"].items()
        }
    return ratios


class Judge:
    """Judges loops, and networks which it trains: by their error, and by perplexity in all layers of the model.

    Args:
        steps: of the training.
        texts: of the language model, that judge.
        training: tokens of each spread to train on.
    """

    def __init__(self, steps: int, texts: int, training: int) -> None:
        self.steps, loaded = steps, load_model(MODEL)
        generator = torch.Generator().manual_seed(SEED)
        spreads = torch.tensor(SPREADS).reshape(-1, 1, 1)
        self.normal = ScoreSets(
            *(spreads * torch.randn(len(SPREADS), count, ENTRIES, generator=generator) for count in (training, JUDGES))
        )
        self.model, self.tokens = loaded.module, loaded.held_out.inputs["tokens"][:texts]
        calibration = loaded.calibration.inputs["tokens"]
        self.of_model = ScoreSets(*(scores_of(self.model, tokens) for tokens in (calibration, self.tokens)))
        self.expected = losses(logits_of(self.model, self.tokens, None), self.tokens)

    def __call__(self, name: str, half_steps: int) -> Row:
        """Return the errors of a loop, or of a network and its half-steps, and by how much perplexity grows."""
        layers = range(len(self.of_model.judging))
        if name == LOOP:
            plan = loop(half_steps)
            results, of_layers = [in_layout(plan, each.judging) for each in self.sets], [plan] * len(layers)
        else:
            kind, width = KINDS[name]
            torch.manual_seed(SEED)
            networks = [train(kind(each.training, width), each, half_steps, self.steps) for each in self.sets]
            with torch.no_grad():
                results = [plans(one, each.judging, half_steps) for one, each in zip(networks, self.sets, strict=True)]
            of_layers = [plan_of(networks[1].alone(number), half_steps) for number in layers]
        of_spreads, errors = (each.errors(result) for each, result in zip(self.sets, results, strict=True))
        named = {f"spread {spread:g}": error for spread, error in zip(SPREADS, of_spreads, strict=True)}
        return {
            "name": name,
            "half_steps": half_steps,
            "errors": {**named, OF_MODEL: float(np.sqrt(np.mean(np.square(errors))))},
            "layers": errors,
            "perplexity": growth(losses(logits_of(self.model, self.tokens, of_layers), self.tokens), self.expected),
        }

    @property
    def sets(self) -> tuple[ScoreSets, ScoreSets]:
        """Normal scores, and those of the model's layers."""
        return self.normal, self.of_model


def in_layout(plan: Plan, scores: Tensor) -> Tensor:
    """Return what a loop makes of scores (K, T, 16)."""
    return plan(scores.unflatten(-1, (SIDE, SIDE))).flatten(-2)


def scores_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the scores of all layers on texts: (layers, texts * characters, 16)."""
    with torch.no_grad():
        return torch.cat([run(model, batch.inputs["tokens"])[1] for batch in batches(tokens)], dim=1).flatten(-2)


def logits_of(model: nn.Module, tokens: Tensor, of_layers: list[Plan] | None) -> Tensor:
    """Return the logits of texts, with other loops in the layers or with the model's own."""
    with torch.no_grad():
        return torch.cat([run(model, batch.inputs["tokens"], of_layers)[0] for batch in batches(tokens)])


def plan_of(network: Network, half_steps: int) -> Plan:
    """Return a network of one set with its half-steps as a loop in the language model."""
    return lambda scores: plans(network, scores.reshape(1, -1, ENTRIES), half_steps).reshape(scores.shape)


def document(data: Row) -> Iterator[str]:
    """Yield the lines of a part of the document."""
    rows = data["rows"]
    sets, counts = list(rows[0]["errors"]), list(rows[0]["speed"])
    yield (
        f"| dual by | half-steps | {' | '.join(f'times exact, {int(count):,} tokens' for count in counts)} | "
        f"{' | '.join(f'error, {scores}' for scores in sets)} | perplexity (95%) |"
    )
    yield f"|---|---:|{'---:|' * (len(counts) + len(sets) + 1)}"
    for row in rows:
        of_most = row["speed"][counts[-1]]
        times = [f"{row['speed'][count]['times_exact'][0]:.2f}" for count in counts]
        cells = [f"{row['errors'][s]:.4f}" + gain_of(of_most, s) for s in sets]
        change = "{:+.3%} ({:+.3%} to {:+.3%})".format(*row["perplexity"])
        name = "nothing, a loop" if row["name"] == LOOP else row["name"]
        yield f"| {name} | {row['half_steps']} | {' | '.join([*times, *cells])} | {change} |"
    yield ""
    networks = [row for row in rows if row["name"] != LOOP]
    for scores in sets:
        best = max(networks, key=lambda row: row["speed"][counts[-1]]["gains"][scores][1])
        gain = best["speed"][counts[-1]]["gains"][scores]
        yield (
            f"- {scores}: the network that gains most, {best['name']} and {best['half_steps']} half-steps, is "
            f"{gain[0]:.2f} ({gain[1]:.2f} to {gain[2]:.2f}) times as fast as the loop of "
            f"{best['speed'][counts[-1]]['loops'][scores]}, on {int(counts[-1]):,} tokens."
        )
    whole = data["whole"]
    yield ""
    calls = [f"times exact, {row['tokens']:,} tokens" for row in whole]
    yield f"| the language model, whole | {' | '.join(calls)} |"
    yield f"|---|{'---:|' * len(whole)}"
    for name in whole[0]["ms"]:
        if name != EXACTLY:
            yield f"| {name} | {' | '.join(with_interval(row['times_exact'][name]) for row in whole)} |"


def gain_of(speed_of_row: Row, scores: str) -> str:
    """Return a network's gain in brackets; a loop has none."""
    return f" ({speed_of_row['gains'][scores][0]:.2f})" if "gains" in speed_of_row else ""


if __name__ == "__main__":
    main()
