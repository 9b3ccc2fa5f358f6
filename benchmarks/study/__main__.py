"""Trains models with Sinkhorn attention and their rivals, compiles them, and writes down what each step keeps.

    python -m benchmarks.study                    # what is missing: some three and a half hours on two cores
    python -m benchmarks.study --only frozen      # one part, of what is missing
    python -m benchmarks.study --render           # the page and its figures alone
    python -m benchmarks.study --quick            # all of it at small size, in less than ten minutes: does it work?

Models are trained first, two at a time, and kept in benchmarks/cache/study/. Cases are then measured: two at a time
where they time nothing, and the others one by one, on an otherwise idle machine. Results are written after each model
and each case, so that the study may be stopped and goes on where it was. Writes benchmarks/results/study.json,
docs/study.md between its two markers, and the figures docs/study-*.png; with --quick all of these go to
benchmarks/cache/study-quick/.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.generated import replace_generated
from benchmarks.study import compelled, downstream, frozen, sinks, summary, swaps, training_cost
from benchmarks.study.models import ROOT, folder_of, train_missing
from benchmarks.study.running import done, prepare

PARTS = {
    "downstream": downstream,
    "frozen": frozen,
    "swaps": swaps,
    "training-cost": training_cost,
    "sinks": sinks,
    "compelled": compelled,
}
UNTIMED = {"swaps", "sinks", "compelled"}
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "study.json", ROOT / "docs" / "study.md"


def main() -> None:
    """Train and measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the whole study at small size")
    parser.add_argument("--only", choices=list(PARTS), help="measure one part")
    parser.add_argument("--render", action="store_true", help="write the page and its figures only")
    parser.add_argument("--processes", type=int, default=2, help="at once, where none is timed")
    options = parser.parse_args()
    prepare()
    results, document = RESULTS, DOCUMENT
    if options.quick:
        scratch = folder_of(quick=True)
        scratch.mkdir(parents=True, exist_ok=True)
        results, document = scratch / RESULTS.name, scratch / DOCUMENT.name
        shutil.copyfile(DOCUMENT, document)
    rows: dict[str, dict[str, Any]] = json.loads(results.read_text())["parts"] if results.exists() else {}
    if not options.render:
        if options.only is None:  # a part alone trains those that it measures
            train_missing(options.quick, options.processes)
        measure(rows, results, options)
    parts = {name: rows[name] for name in PARTS if name in rows}
    for name, of_part in parts.items():
        if hasattr(PARTS[name], "draw"):
            PARTS[name].draw(of_part, document.parent)
    replace_generated(document, page(parts))
    print(f"written: {document}")


def measure(rows: dict[str, dict[str, Any]], results: Path, options: argparse.Namespace) -> None:
    """Measure the cases that are missing, and write the results after each."""
    for name, part in PARTS.items():
        if options.only not in (None, name):
            continue
        cases, of_part = part.cases(options.quick), rows.get(name, {})
        missing = {case: run for case, run in cases.items() if case not in of_part}
        for case, row, seconds in done(missing, options.processes if name in UNTIMED else 1):
            of_part[case] = row
            rows[name] = {case: of_part[case] for case in cases if case in of_part}
            print(f"{name:14} {case:40} {seconds:6.1f} s", flush=True)
            partial = results.with_suffix(".partial")
            write_json(partial, {"parts": rows, "environment": environment(seed=0)})
            partial.rename(results)


def page(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the generated lines of the page."""
    yield from summary.section(parts)
    for name, of_part in parts.items():
        yield ""
        yield from PARTS[name].section(of_part)


if __name__ == "__main__":
    main()
