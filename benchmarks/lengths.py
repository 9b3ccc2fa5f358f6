"""What operators that were fitted at one length keep at others, beside those that were fitted there.

    python -m benchmarks.teachers --only 'pointset*'  # trains the teachers, once
    python -m benchmarks.lengths

Teachers on sets of 128 points; held-out sets of 64 to 512 points, none of which a fit has seen. relc is the mean of the
sites. Writes benchmarks/results/lengths.json.
"""

import argparse
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from asapc.commands.study import study
from asapc.config import CompileConfig
from asapc.fidelity.sites import candidate_fidelity
from asapc.planning.operators import build
from asapc.planning.propose import propose
from asapc.training.shapes import POINTS, point_sets
from asapc.types.choices import Candidate
from asapc.types.samples import Samples
from asapc.types.teacher import Teacher
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.fidelity import estimated_from
from benchmarks.teachers import cached

RESULTS = Path(__file__).resolve().parent / "results" / "lengths.json"
LENGTHS = (64, 128, 256, 512)
FITTED, HELD_OUT, SEED = 32, 32, 7
STEPS = 2
OPTIONS = CompileConfig(pieces=(0, 8))


def main() -> None:
    """Compare on every point-set teacher, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="pointset_T20*", metavar="PATTERN", help="names of teachers, as in a shell")
    only = parser.parse_args().only
    rows: list[dict[str, Any]] = []
    for name, path in cached():
        if not fnmatch(name, only):
            continue
        proposed = {length: fit(path, length) for length in LENGTHS}
        for length, (teacher, candidates) in proposed.items():
            fitted_elsewhere = proposed[POINTS][1]
            for where, fits in ((POINTS, fitted_elsewhere), (length, candidates)):
                errors = relc(teacher, fits)
                rows.append({"teacher": name, "length": length, "fitted_at": where, "relc": errors})
                print(
                    f"{name:<32} {length:>4} fitted at {where:>4}",
                    *(f"{k} {v:.3f}" for k, v in errors.items()),
                    flush=True,
                )
    write_json(RESULTS, {"rows": rows, "steps": STEPS, "environment": environment(SEED)})


def fit(path: Path, length: int) -> tuple[Teacher, dict[str, list[Candidate]]]:
    """Return a teacher studied at a length, and candidates that are fitted there."""
    points, _ = point_sets(FITTED + HELD_OUT, SEED, length)
    samples, held_out = Samples({"points": points[:FITTED]}), Samples({"points": points[FITTED:]})
    teacher = study(path, OPTIONS, lambda loaded, config: (samples, held_out))
    return teacher, propose(teacher, OPTIONS)


def relc(teacher: Teacher, candidates: Mapping[str, list[Candidate]]) -> dict[str, float]:
    """Return the error of the sliced duals with STEPS closure steps, by side and features."""
    sites, modules = teacher.sites, {}
    for site in sites:
        sliced = [c for c in candidates[site.name] if c.params is not None and len(c.params.weights) == 1 + STEPS]
        modules[site.name] = {i: build(site, candidate) for i, candidate in enumerate(sliced)}
    fidelities = candidate_fidelity(teacher.graph, sites, modules, teacher.held_out)
    kinds = [estimated_from(c.params) for c in sliced if c.params]
    return {kind: fmean(fidelities[site.name][i].relc for site in sites) for i, kind in enumerate(kinds)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
