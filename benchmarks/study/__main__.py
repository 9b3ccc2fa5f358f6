"""Trains models with Sinkhorn attention and their rivals, compiles them, and writes down what each step keeps.

    python -m benchmarks.study                    # what is missing: less than three hours on two cores
    python -m benchmarks.study --only frozen      # one part, of what is missing
    python -m benchmarks.study --render           # the page and its figures alone
    python -m benchmarks.study --quick            # all of it at small size, in less than ten minutes: does it work?

Models are trained first, two at a time, and kept in benchmarks/cache/study/. Then one process measures the cases that
time something, one by one, while the other chooses operators for them, which the planner keeps, and measures all else:
what is compared takes turns, so that other work slows all of it alike. Results are written after each step, so that
the study may be stopped and goes on where it was. Writes benchmarks/results/study.json, docs/study.md between its two
markers, and the figures docs/study-*.png; with --quick all of these go to benchmarks/cache/study-quick/.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.generated import replace_generated
from benchmarks.study import compelled, downstream, frozen, sinks, summary, swaps, training_cost
from benchmarks.study.models import ROOT, folder_of, trainings
from benchmarks.study.running import done, prepare

PARTS = {
    "downstream": downstream,
    "frozen": frozen,
    "swaps": swaps,
    "training-cost": training_cost,
    "sinks": sinks,
    "compelled": compelled,
}
TIMED = ("training-cost", "downstream", "frozen")  # in this order: operators are chosen meanwhile
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "study.json", ROOT / "docs" / "study.md"


def main() -> None:
    """Train and measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the whole study at small size")
    parser.add_argument("--only", choices=list(PARTS), help="measure one part")
    parser.add_argument("--render", action="store_true", help="write the page and its figures only")
    parser.add_argument("--processes", type=int, default=2, help="at once; one of them times")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error("--processes is at least 1")
    prepare()
    results, document = RESULTS, DOCUMENT
    if options.quick:
        scratch = folder_of(quick=True)
        scratch.mkdir(parents=True, exist_ok=True)
        results, document = scratch / RESULTS.name, scratch / DOCUMENT.name
        shutil.copyfile(DOCUMENT, document)
    kept: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"parts": {}, "seconds": 0.0}
    if not options.render:
        measure(kept, results, options)
    parts = {name: kept["parts"][name] for name in PARTS if name in kept["parts"]}
    for name, of_part in parts.items():
        if hasattr(PARTS[name], "draw"):
            PARTS[name].draw(of_part, document.parent)
    took = f"All of it took {kept['seconds'] / 3600:.1f} hours, training included, on an {kept['environment']['cpu']}."
    replace_generated(document, page(parts, took))
    print(f"written: {document}")


def measure(kept: dict[str, Any], results: Path, options: argparse.Namespace) -> None:
    """Do what is missing, and write the results after each step, with the seconds that all runs took together."""
    cases = {name: part.cases(options.quick) for name, part in PARTS.items() if options.only in (None, name)}
    rows: dict[str, dict[str, Any]] = kept["parts"]

    def missing(*names: str) -> dict[tuple[str, str], Callable[[], dict[str, Any]]]:
        of_parts = {name: cases[name] for name in names if name in cases}
        return {
            (name, case): run
            for name, of_part in of_parts.items()
            for case, run in of_part.items()
            if case not in rows.get(name, {})
        }

    before, begin = kept["seconds"], time.perf_counter()

    def write(step: str, case: str, seconds: float) -> None:
        kept.update(seconds=before + time.perf_counter() - begin, environment=environment(seed=0))
        print(f"{step:14} {case:40} {seconds:6.1f} s", flush=True)
        partial = results.with_suffix(".partial")
        write_json(partial, kept)
        partial.rename(results)

    timed, others = missing(*TIMED), missing(*(name for name in PARTS if name not in TIMED))
    if options.only is None and timed | others:  # a part alone trains those that it measures
        for (step, case), _, seconds in done((trainings(options.quick), options.processes)):
            write(step, case, seconds)
        plans = downstream.plans(options.quick)
        others = {("planning", case): plans[case] for step, case in timed if step == "downstream"} | others
    lanes = [(timed, 1), (others, options.processes - 1)] if options.processes > 1 else [(others | timed, 1)]
    for (step, case), row, seconds in done(*lanes):
        if step in cases:
            of_part = {**rows.get(step, {}), case: row}
            rows[step] = {case: of_part[case] for case in cases[step] if case in of_part}
        write(step, case, seconds)


def page(parts: dict[str, dict[str, Any]], took: str) -> Iterator[str]:
    """Yield the generated lines of the page."""
    yield from summary.section(parts)
    yield from ("", took)
    for name, of_part in parts.items():
        yield ""
        yield from PARTS[name].section(of_part)


if __name__ == "__main__":
    main()
