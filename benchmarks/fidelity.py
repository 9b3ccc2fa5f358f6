"""What every operator keeps of trained teachers, and what it is estimated to cost: the study behind the defaults.

    python -m benchmarks.teachers                     # trains the teachers, once
    python -m benchmarks.fidelity
    python -m benchmarks.fidelity --only 'pointset*'  # replaces these rows
    python -m benchmarks.fidelity --render            # the figure and the tables alone

Each operator stands at all sites at once: relc of each site on held-out samples, and the agreement of the whole model.
Beside them what the planner chooses with its defaults. Writes benchmarks/results/fidelity.json, the figure
docs/fidelity.png, and what stands in docs/fidelity.md between the two markers.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from asapc.backends.eager.runner import EagerRunner
from asapc.config import CompileConfig
from asapc.fidelity.outputs import agreement, first_output
from asapc.fidelity.sites import candidate_fidelity, site_fidelity
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.alternatives import judge
from asapc.planning.check import Check
from asapc.planning.choose import decide
from asapc.planning.costs import estimate, shipped
from asapc.planning.operators import Operator, build, exact_operator, lower, operators, softmax_operator
from asapc.planning.propose import propose, split
from asapc.planning.ranges import score_ranges, wide_sites
from asapc.timing.rounds import measure
from asapc.types.choices import SIDES, Alternatives, Candidate, SlicedDualParams
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.rewrite import export_rivals
from benchmarks.generated import replace_generated
from benchmarks.teachers import studied

ROOT = Path(__file__).resolve().parent
RESULTS, FIGURE, DOCUMENT = (
    ROOT / "results" / "fidelity.json",
    ROOT.parent / "docs" / "fidelity.png",
    ROOT.parent / "docs" / "fidelity.md",
)
BUDGETS: tuple[tuple[str, ...], ...] = ((), ("relc<=0.05",), ("agreement>=0.98",), ("agreement>=0.92",))
HELD_OUT, BATCH = 256, 8
# Lines of the figure, by how the names of their operators begin.
FAMILIES = (
    "truncated",
    "one pass",
    *(f"{side}, {of}," for side in SIDES for of in ("parabolas", "hinges", "pairs and hinges")),
    "keys, 8 slices,",
)
# What is timed beside softmax, the exact form and one pass: truncated forms of as many half-steps.
TIMED, SECONDS = (2, 3, 4, 6, 8, 12, 16), 6.0
Row = dict[str, Any]


def main() -> None:
    """Study the teachers that are there, write the JSON, render figure and document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of teachers, as in a shell")
    parser.add_argument("--one-pass", action="store_true", help="judge one pass alone; all else stays as it was")
    parser.add_argument("--timed", action="store_true", help="time one pass and its rivals alone, on an idle machine")
    parser.add_argument("--render", action="store_true", help="render the figure and the document only")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # sharp plans are full of them, and they are slow
    data: Row = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"teachers": {}}
    for name, teacher in () if options.render else studied(options.only):
        if options.timed:
            data["teachers"][name]["timed"] = time_one_pass(name, teacher)
        elif options.one_pass:
            data["teachers"][name]["operators"] |= compare(name, teacher, one_pass=True)["operators"]
        else:
            data["teachers"][name] = compare(name, teacher)
        data["environment"] = environment(seed=0)
        write_json(RESULTS, data)
    draw(data["teachers"])
    replace_generated(DOCUMENT, document(data["teachers"]))


def compare(name: str, teacher: Teacher, one_pass: bool = False) -> Row:
    """Return all operators on one teacher and what the planner takes of them, or one pass alone."""
    teacher = replace(teacher, held_out=teacher.held_out[:HELD_OUT])
    graph, sites, calibration, held_out = teacher.graph, teacher.sites, teacher.calibration, teacher.held_out
    if not sites:
        print(f"{name}: no site was found", flush=True)
        return {"sites": 0, "operators": {}}
    wide = wide_sites(score_ranges(graph, sites, calibration))
    candidates = propose(teacher, CompileConfig())
    costed = {} if one_pass else judge(graph, sites, candidates, wide, split(calibration)[0], BATCH, shipped())
    for site_name, more in propose(teacher, CompileConfig(slices=(8,), pieces=(0,))).items():
        candidates[site_name] += [candidate for candidate in more if candidate.params is not None]
    if one_pass:
        candidates = {
            name: [c for c in of if c.params is not None and c.params.one_pass] for name, of in candidates.items()
        }
    modules = {s.name: {kind(c): build(s, c, wide) for c in candidates[s.name]} for s in sites}
    fidelities = candidate_fidelity(graph, sites, modules, held_out)
    reference = first_output(EagerRunner(graph.program.module()), held_out)
    exact = sum(estimate(s, exact_operator(s, wide=s.name in wide), BATCH, shipped()) for s in sites)
    rows: Row = {}
    for label in modules[sites[0].name]:
        of_sites = {s.name: modules[s.name][label] for s in sites if label in modules[s.name]}
        rows[label] = {
            "relc": [fidelities[s.name][label].relc for s in sites if label in modules[s.name]],
            "agreement": agreed(graph, sites, of_sites, reference, held_out),
            "cost": sum(estimate(s, of_sites[s.name], BATCH, shipped()) for s in sites if s.name in of_sites) / exact,
        }
        print(
            f"{name:<32} {label:<32}", *(f"{r:.4f}" for r in rows[label]["relc"]), rows[label]["agreement"], flush=True
        )
    if one_pass:
        return {"operators": rows}
    planned: Row = {}
    check = Check(teacher, Alternatives(costed, wide))
    for budget in BUDGETS:
        chosen = decide(check, CompileConfig(fidelity=budget))
        choices = [chosen.choices[s.name].candidate for s in sites]
        chosen_modules = operators(sites, chosen)
        planned[" ".join(budget) or "default"] = {
            "operators": [kind(candidate) for candidate in choices],
            "relc": [f.relc for f in site_fidelity(graph, sites, chosen_modules, held_out).values()],
            "agreement": agreed(graph, sites, chosen_modules, reference, held_out),
            "cost": sum(candidate.cost for candidate in choices) / exact,
        }
    print(f"{name:<32} {planned}", flush=True)
    return {"sites": len(sites), "half_steps": sites[0].loop.half_steps, "operators": rows, "planned": planned}


def time_one_pass(name: str, teacher: Teacher) -> Row:
    """Return one pass and its rivals at all sites: milliseconds in ONNX Runtime, interleaved, and agreement."""
    teacher = replace(teacher, held_out=teacher.held_out[:HELD_OUT])
    graph, sites, held_out = teacher.graph, teacher.sites, teacher.held_out
    wide = wide_sites(score_ranges(graph, sites, teacher.calibration))
    candidates = propose(teacher, CompileConfig(operators="one-pass", pieces=(8,)))
    modules: dict[str, dict[str, Operator]] = {"softmax": {s.name: softmax_operator(s) for s in sites}}
    shorter = [t for t in TIMED if t < sites[0].loop.half_steps]
    modules |= {f"truncated {t}": {s.name: exact_operator(s, t, s.name in wide) for s in sites} for t in shorter}
    modules["exact"] = {s.name: exact_operator(s, wide=s.name in wide) for s in sites}
    for site in sites:
        for candidate in candidates[site.name][1:]:
            modules.setdefault(kind(candidate), {})[site.name] = build(site, candidate, wide)
    for of_sites in modules.values():
        for site in sites:
            lower(site, of_sites[site.name], BATCH, shipped())
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        runners = export_rivals(teacher, modules, threads, Path(folder), lambda detail: None)
    runs = measure(runners, held_out, BATCH, SECONDS)
    reference = first_output(EagerRunner(graph.program.module()), held_out)
    rows = {
        run.name: {"p50_ms": run.p50_ms, "agreement": agreed(graph, sites, modules[run.name], reference, held_out)}
        for run in runs
    }
    print(f"{name:<32} {rows}", flush=True)
    return {"threads": threads, "batch": BATCH, "operators": rows}


def kind(candidate: Candidate) -> str:
    """Return the name of an operator in the results."""
    if candidate.params is None:
        return f"{candidate.operator} {candidate.half_steps}"
    if candidate.params.one_pass:
        return estimated_from(candidate.params)
    return f"{estimated_from(candidate.params)}, {len(candidate.params.weights) - 1} steps"


def estimated_from(params: SlicedDualParams) -> str:
    """Return what an operator estimates, and from what beside parabolas and mean."""
    parts = [f"{params.slices} slices" if name == "slices" else name for name in params.features[2:]]
    return f"{'one pass' if params.one_pass else params.side}, {' and '.join(parts) or 'parabolas'}"


def agreed(
    graph: CapturedGraph,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    reference: torch.Tensor,
    samples: Samples,
) -> float | None:
    """Return the share of the samples for which the model with these operators names the teacher's class."""
    return agreement(reference, outputs_with(graph, sites, modules, samples), labelled=True)


def outputs_with(
    graph: CapturedGraph, sites: Sequence[Site], modules: Mapping[str, nn.Module], samples: Samples
) -> torch.Tensor:
    """Return the first output of the model with these operators."""
    rewritten = RewriteSinkhorn(sites, modules)(graph.program.module()).program
    return first_output(EagerRunner(rewritten), samples)


def by_kind_of_teacher(teachers: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Return the studies of the seeds of each kind of teacher, by its name without the seed."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for name, row in teachers.items():
        if row["sites"]:
            groups[re.sub(r"_seed\d+$", "", name)].append(row)
    return dict(groups)


def mean_relc(row: Row) -> float:
    """Return the error of an operator, mean over the sites."""
    return fmean(row["relc"])


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean of the seeds, with least and largest where there are several."""
    shown = f"{fmean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def document(teachers: Mapping[str, Row]) -> Iterator[str]:
    """Yield lines of the generated part: a table of operators for each kind of teacher."""
    for name, rows in by_kind_of_teacher(teachers).items():
        yield f"### {name}: {rows[0]['half_steps']} half-steps, {len(rows)} seed{'s' * (len(rows) > 1)}"
        yield ""
        yield "| operator | relc, mean of sites | agreement | estimated cost |"
        yield "|---|---|---|---|"
        labels = [label for label in rows[0]["operators"] if all(label in row["operators"] for row in rows)]
        for label in labels:
            of_seeds = [row["operators"][label] for row in rows]
            yield line(label, of_seeds)
        for budget in (b for b in rows[0]["planned"] if all(b in row["planned"] for row in rows)):
            yield line(f"*planned: {budget}*", [row["planned"][budget] for row in rows])
        yield ""
        if all("timed" in row for row in rows):
            yield from timed_table([row["timed"]["operators"] for row in rows])


def timed_table(of_seeds: Sequence[Row]) -> Iterator[str]:
    """Yield one pass beside its rivals, by measured time."""
    yield "| at all sites, whole model in ONNX Runtime | times softmax, measured | agreement |"
    yield "|---|---|---|"
    by_time = sorted(of_seeds[0], key=lambda label: fmean(row[label]["p50_ms"] for row in of_seeds))
    for label in by_time:
        times = spread([row[label]["p50_ms"] / row["softmax"]["p50_ms"] for row in of_seeds], 2)
        yield f"| {label} | {times} | {spread([row[label]['agreement'] for row in of_seeds], 3)} |"
    yield ""


def line(label: str, of_seeds: Sequence[Row]) -> str:
    """Return one operator's row of a table."""
    relc = spread([mean_relc(row) for row in of_seeds], 3)
    agree = spread([row["agreement"] for row in of_seeds], 3)
    return f"| {label} | {relc} | {agree} | {fmean(row['cost'] for row in of_seeds):.2f} |"


def draw(teachers: Mapping[str, Row]) -> None:
    """Draw error against cost, a panel for each kind of teacher, a line for each family of operators."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    groups = by_kind_of_teacher(teachers)
    columns = 4
    rows = -(-len(groups) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.4 * rows), squeeze=False)
    for panel, (name, of_seeds) in zip(panels.flat, groups.items(), strict=False):
        for number, family in enumerate(FAMILIES):
            points = family_points(family, of_seeds)
            style = {"color": "black", "linestyle": "--"} if family == "truncated" else {"color": f"C{number}"}
            if family == "one pass":
                style["linestyle"] = ""  # by their features: no order joins them
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=4 if family == "one pass" else 3,
                    label=family.rstrip(","),
                    **style,
                )
        panel.axhline(0.08, color="black", linewidth=0.5)
        panel.axvline(1.0, color="black", linewidth=0.5)
        panel.set(title=name.replace("_", " "), yscale="log", xlabel="estimated cost, exact form = 1", ylabel="relc")
        panel.title.set_fontsize(9)
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        panel.tick_params(labelsize=8)
    for panel in list(panels.flat)[len(groups) :]:
        panel.axis("off")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=8)
    figure.savefig(FIGURE, dpi=110)


def family_points(family: str, of_seeds: Sequence[Row]) -> list[tuple[float, float]]:
    """Return the cost and error of the operators of a family, means of the seeds, cheapest first."""
    points = []
    for label in of_seeds[0]["operators"]:
        rows = [row["operators"][label] for row in of_seeds if label in row["operators"]]
        if label.startswith(family) and ("slices" in label) == ("slices" in family) and len(rows) == len(of_seeds):
            points.append((fmean(row["cost"] for row in rows), fmean(map(mean_relc, rows))))
    return sorted(points)


if __name__ == "__main__":
    main()
