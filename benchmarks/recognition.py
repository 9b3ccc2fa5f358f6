"""What the finder finds: over the zoo of tests/helpers/zoo, over random models, and in how long on a large one.

    python -m benchmarks.recognition             # every model of the zoo
    python -m benchmarks.recognition --fuzz 600  # random models of tests/helpers/compositions
    python -m benchmarks.recognition --large     # 12 layers, 12 heads, 197 tokens

Each writes its part of benchmarks/results/recognition.json, and what stands in docs/recognition.md between the two
markers. Run from the root of a checkout.
"""

import argparse
import json
import logging
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.events import Timed
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.choose import choose
from asapc.planning.costs import shipped
from asapc.planning.operators import operators
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.generated import replace_generated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the zoo and the random models are the tests' own

from helpers.relowering import PROBED, outputs, relowered, worst  # noqa: E402
from helpers.verdicts import WRONG, Verdict, drawn, judged  # noqa: E402
from helpers.zoo import NEGATIVES, POSITIVES, Case  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "recognition.json"
DOCUMENT = ROOT / "docs" / "recognition.md"
FITTED, HELD_OUT = 64, 32  # samples

Row = dict[str, Any]


def main() -> None:
    """Measure what is asked for, write the JSON, render the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, metavar="N", help="try N random models")
    parser.add_argument("--seed", type=int, default=0, help="of the random models")
    parser.add_argument("--large", action="store_true", help="time a model of ViT-B's size")
    parser.add_argument("--render", action="store_true", help="render the document only")
    options = parser.parse_args()
    quieten()
    if options.large:
        torch.set_num_threads(2)
    part: Row = {}
    if options.fuzz:
        part["fuzz"] = fuzz(options.fuzz, options.seed)
    elif options.large:
        part["large"] = large()
    elif not options.render:
        part["positives"] = [examine(case) for case in POSITIVES]
        part["negatives"] = [examine(case) for case in NEGATIVES]
    replace_generated(DOCUMENT, document(write_part(part, options.seed)))
    failed = [f"{row['name']}: {row['error']}" for row in part.get("positives", ()) if "error" in row]
    if failed:
        raise SystemExit("\n".join(failed))


def write_part(part: Row, seed: int) -> Row:
    """Write a part of the results beside the others, and return all of them."""
    # Read only now: another part may have been written meanwhile.
    data: Row = (json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}) | part
    if part:
        data["environment"] = environment(seed)
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, data)
    return data


def examine(case: Case) -> Row:
    """Return everything that the document says of one model of the zoo."""
    torch.manual_seed(0)
    module = case.build().eval()
    fitted, held_out = (case.inputs(size, torch.Generator().manual_seed(size)) for size in (FITTED, HELD_OUT))
    row: Row = {"name": case.name, "style": style(case, module), "reason": case.reason}
    timed = Timed(lambda event: None)
    teacher = study_module(module, Samples(fitted), Samples(held_out), on_event=timed)
    graph, findings = teacher.graph, teacher.findings
    row["find_seconds"] = timed.seconds["find"]
    row["sites"] = [described(site) for site in findings.sites]
    row["misses"] = [{"reason": miss.reason, "hint": miss.hint} for miss in findings.misses]
    stops = graph.early_stops
    row["early_stop_difference"] = None if stops is None else stops.difference
    if findings.sites:
        expected = outputs(graph.program.module(), held_out)
        try:
            row["exact_difference"] = worst(outputs(relowered(graph, findings.sites, fitted), held_out), expected)
            row |= amortised(teacher, expected)
        except Exception as error:  # a defect of one model must not lose what is known of the others
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"{case.name:<32} {len(findings.sites)} sites, {row['find_seconds']:.2f} s", flush=True)
    return row


def style(case: Case, module: nn.Module) -> str:
    """Return the first sentence that a model's code says of itself, or its name."""
    part = getattr(module, "attention", module)
    text = type(part if isinstance(part, nn.Module) else module).__doc__
    return " ".join(text.split("\n\n")[0].split()) if text else case.name.replace("_", " ")


def described(site: Site) -> Row:
    """Return a site as data."""
    return {
        "half_steps": site.loop.half_steps,
        "last": site.loop.last,
        "kind": "attention" if site.wiring.applied else "plan",
        "epsilon": site.epsilon,
        "masked": site.loop.masked,
        "axes": site.wiring.plan.axes,
        "queries": site.loop.queries,
        "keys": site.loop.keys,
    }


def amortised(teacher: Teacher, expected: list[Tensor]) -> Row:
    """Return the operators that the default budget gets, and what they do to the outputs."""
    selection = choose(teacher, CompileConfig(fidelity=("relc<=0.08",)), shipped())
    modules = operators(teacher.sites, selection)
    rewritten = RewriteSinkhorn(teacher.sites, modules)(teacher.graph.program.module()).program
    return {
        "choices": [
            {
                "operator": choice.candidate.operator,
                "half_steps": choice.candidate.half_steps,
                "reason": choice.reason,
            }
            for choice in selection.choices.values()
        ],
        "amortised_difference": worst(outputs(rewritten, teacher.held_out.inputs), expected),
    }


def fuzz(count: int, seed: int) -> Row:
    """Judge random models, every other one a near-miss, at five scales and in other company; write as it goes."""
    kinds: dict[str, Counter[str]] = {"sinkhorn": Counter(), "near_misses": Counter()}
    families: dict[str, Counter[str]] = {}
    examples: dict[str, list[str]] = {"wrong": [], "not_found": [], "crashed": []}
    largest = 0.0
    # A process keeps what torch compiled and traced; a fresh one now and then bounds the memory.
    # (concurrent.futures has such a pool too; it stops for ever when two processes are renewed at once.)
    with get_context("spawn").Pool(initializer=quieten, maxtasksperchild=50) as pool:
        for number, (verdict, crash) in enumerate(pool.imap(partial(tried, seed=seed), range(count))):
            composition = drawn(number, seed)
            sinkhorn = composition.poison == "none"
            kind = verdict.kind if verdict else "crashed"
            kinds["sinkhorn" if sinkhorn else "near_misses"][kind] += 1
            if not sinkhorn:
                families.setdefault(composition.poison, Counter())[kind] += 1
            if verdict is None:
                examples["crashed"].append(f"{composition}: {crash}")
            elif kind == "wrong":
                change = f"{verdict.difference:.1e}, from {verdict.scale:g} times the scores on"
                examples["wrong"].append(f"{composition}: {change}")
            elif kind == "right":
                largest = max(largest, verdict.difference)
            elif sinkhorn:
                examples["not_found"].append(f"{composition}: {'; '.join(verdict.reasons) or 'no candidate'}")
            row = {
                "seed": seed,
                "models": number + 1,
                "counts": {name: dict(sorted(counter.items())) for name, counter in kinds.items()},
                "families": {name: dict(counter) for name, counter in sorted(families.items())},
                "largest_difference": largest,
                **examples,
            }
            if number % 20 == 19:
                print(f"{number + 1} of {count}: {row['counts']}", file=sys.stderr, flush=True)
                write_part({"fuzz": row}, seed)
    return row


def quieten() -> None:
    """Run torch on one thread, without warnings."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def tried(number: int, seed: int) -> tuple[Verdict | None, str]:
    """Return the verdict on a random model, or what it raised."""
    try:
        return judged(drawn(number, seed)), ""
    except Exception as error:  # one model that crashes must not lose what is known of the others
        return None, f"{type(error).__name__}: {str(error)[:200]}"


class Block(nn.Module):
    """A transformer's block with Sinkhorn attention in the log domain."""

    def __init__(self, width: int, heads: int, iterations: int) -> None:
        super().__init__()
        self.heads, self.iterations = heads, iterations
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        log_plan = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 / 0.2
        for _ in range(self.iterations):
            log_plan = log_plan - log_plan.logsumexp(dim=-2, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(dim=-1, keepdim=True)
        x = x + self.proj((log_plan.exp() @ v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def large(layers: int = 12, width: int = 768, heads: int = 12, tokens: int = 197, iterations: int = 10) -> Row:
    """Time capture and find on a model of ViT-B's size with random weights."""
    torch.manual_seed(0)
    module = nn.Sequential(*(Block(width, heads, iterations) for _ in range(layers))).eval()
    inputs = {"input": torch.randn(PROBED, tokens, width)}
    timed = Timed(lambda event: None)
    findings = study_module(module, Samples(inputs), on_event=timed).findings
    row: Row = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "tokens": tokens,
        "half_steps": 2 * iterations,
        "threads": torch.get_num_threads(),
        "sites": len(findings.sites),
        "half_steps_found": sorted({site.loop.half_steps for site in findings.sites}),
        "capture_seconds": timed.seconds["capture"],
        "find_seconds": timed.seconds["find"],
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(row)
    return row


def document(data: Row) -> Iterator[str]:
    """Yield lines of the generated part."""
    if "positives" in data:
        successes = [row for row in data["positives"] if row["sites"]]
        seconds = sorted(row["find_seconds"] for row in data["positives"])
        yield f"### Sinkhorn: {len(successes)} of {len(data['positives'])} models are found"
        yield ""
        yield (
            f"`exact` and `amortised` are relative differences of the outputs on {HELD_OUT} samples: with the exact "
            f"form at every site, and with the operators that the default budget gets, fitted on {FITTED} others. "
            f"Finding takes {seconds[len(seconds) // 2]:.2f} s of one core in the median, {seconds[-1]:.1f} s at most."
        )
        yield ""
        yield "| model | style | half-steps, last | epsilon | mask | axes | exact | operator | amortised |"
        yield "|---|---|---|---|---|---|---|---|---|"
        yield from map(positive, successes)
        refused = [row for row in data["positives"] if not row["sites"]]
        yield ""
        yield "Refused, though it is Sinkhorn:"
        yield ""
        yield "| model | style | reason given |"
        yield "|---|---|---|"
        yield from map(negative, refused)
    if "negatives" in data:
        refused = [row for row in data["negatives"] if not row["sites"]]
        yield ""
        yield f"### Not Sinkhorn: {len(refused)} of {len(data['negatives'])} models are left alone"
        yield ""
        yield "| model | style | reason given |"
        yield "|---|---|---|"
        yield from map(negative, data["negatives"])
    if "fuzz" in data:
        yield ""
        yield from fuzz_section(data["fuzz"])
    if "large" in data:
        row = data["large"]
        yield ""
        yield "### A large model"
        yield ""
        yield (
            f"{row['layers']} layers of {row['heads']} heads, width {row['width']}, {row['tokens']} tokens, "
            f"{row['half_steps']} half-steps in the log domain, random weights, {row['threads']} threads: capture "
            f"takes {row['capture_seconds']:.0f} s, finding {row['sites']} sites {row['find_seconds']:.0f} s, at most "
            f"{row['peak_gigabytes']:.1f} GB of memory."
        )
    yield ""
    yield f"Measured on {data['environment']['cpu']}, torch {data['environment']['packages']['torch']}."


def positive(row: Row) -> str:
    """Return the table row of a model that was found."""
    sites, choices = row["sites"], row.get("choices", [])
    cells = [
        row["name"],
        cell(row["style"]),
        joined(f"{site['half_steps']}, {site['last']}" for site in sites),
        joined(shown_epsilon(site["epsilon"]) for site in sites),
        joined("yes" if site["masked"] else "" for site in sites),
        joined(site["axes"] for site in sites),
        f"{row['exact_difference']:.0e}" if "exact_difference" in row else "",
        joined(f"{choice['operator']} {choice['half_steps']}" for choice in choices) or cell(row.get("error", "")),
        f"{row['amortised_difference']:.1e}" if "amortised_difference" in row else "",
    ]
    return "| " + " | ".join(cells) + " |"


def negative(row: Row) -> str:
    """Return the table row of a model in which nothing was found."""
    answer = "; ".join(dict.fromkeys(miss["reason"] for miss in row["misses"])) or "nothing looks like a plan"
    answer = f"**found** {row['sites']}" if row["sites"] else answer
    return f"| {row['name']} | {cell(row['style'])} | {cell(answer)} |"


def fuzz_section(row: Row) -> Iterator[str]:
    """Yield lines about the random models."""
    sinkhorn, near_misses = row["counts"]["sinkhorn"], row["counts"]["near_misses"]
    loops, others = sum(sinkhorn.values()), sum(near_misses.values())
    yield f"### {row['models']} random models"
    yield ""
    yield (
        f"Each is judged in float64 on fresh inputs at 0.1, 1, 3, 10 and 30 times the scores that the finder saw, in "
        f"batches of five, in another order, of two and alone. Of {loops} Sinkhorn models "
        f"{loops - len(row['not_found'])} are found. Of {others} near-misses of {len(row['families'])} families "
        f"{near_misses.get('refused', 0)} are refused; the others hold a loop all the same, before or after what they "
        f"do else. In {len(row['wrong'])} the exact form changes outputs by more than {WRONG:.0e}; elsewhere the most "
        f"is {row['largest_difference']:.0e}. {len(row['crashed'])} crashed."
    )
    titles = {"wrong": "Changed", "not_found": "Not found", "crashed": "Crashed"}
    for key, title in titles.items():
        if row[key]:
            yield ""
            yield f"{title}:"
            yield ""
            yield from (f"- {line}" for line in row[key])


def joined(parts: Iterator[str]) -> str:
    """Return parts with a comma between them, each once where all are the same."""
    texts = list(parts)
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def shown_epsilon(values: list[float] | None) -> str:
    """Return the epsilons of the heads, one where they are the same."""
    return "" if values is None else ", ".join(dict.fromkeys(f"{value:.3g}" for value in values))


def cell(text: str) -> str:
    """Return the text that may stand in a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
