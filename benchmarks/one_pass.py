"""What would bring one pass closer: more calibration samples, or fits site by site on what compiled sites give.

    python -m benchmarks.one_pass                    # the shipped digits teacher
    python -m benchmarks.one_pass --only 'pointset*' # of those that `python -m benchmarks.teachers` trained

From hinges and pairs. Samples beyond the 64 of calibration come from the held-out ones, the others of which judge. With
each number of samples stands what the fit itself predicts that twice as many would take off the error of its estimate
(`planning.ridge.gain_of_doubling`). Site by site, each is fitted in a graph in which those before it are one pass
already. Writes benchmarks/results/one_pass.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asapc.backends.eager.runner import EagerRunner
from asapc.fidelity.outputs import agreement, first_output
from asapc.fidelity.sites import site_fidelity
from asapc.passes.find.sinkhorn import find_sinkhorn
from asapc.passes.rewrite.sinkhorn import RewriteSinkhorn
from asapc.planning.calibrate import FitKey, calibrate
from asapc.planning.operators import build
from asapc.types.choices import Candidate, FeatureSet, SlicedDualParams
from asapc.types.graph import CapturedGraph
from asapc.types.samples import Samples
from asapc.types.site import Site
from asapc.types.teacher import Teacher
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from asapc.writing.rewrite import rewrite
from benchmarks.teachers import studied

RESULTS = Path(__file__).resolve().parent / "results" / "one_pass.json"
FEATURES = FeatureSet(pieces=8, paired=True, one_pass=True)
COUNTS, SELECTION = (24, 48, 96, 192), 16


def main() -> None:
    """Study the teachers, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="digits*seed0", metavar="PATTERN", help="names of teachers, as in a shell")
    data: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"teachers": {}}
    for name, teacher in studied(parser.parse_args().only):
        data["teachers"][name] = compare(name, teacher)
        data["environment"] = environment(seed=0)
        write_json(RESULTS, data)


def compare(name: str, teacher: Teacher) -> list[dict[str, Any]]:
    """Return one pass at all sites of a teacher, by the number of samples and the way to fit."""
    pool, judges = divide(teacher)
    selection = teacher.calibration[:SELECTION]
    reference = first_output(EagerRunner(teacher.graph.program.module()), judges)
    rows = []
    for count in COUNTS:
        for way, params in {
            "each on the teacher": at_once(teacher, pool[:count], selection),
            "site by site": in_turn(teacher, pool[:count], selection),
        }.items():
            modules = modules_of(teacher.sites, params)
            of_sites = site_fidelity(teacher.graph, teacher.sites, modules, judges)
            compiled = RewriteSinkhorn(teacher.sites, modules)(teacher.graph.program.module()).program
            rows.append(
                {
                    "samples": count,
                    "fitted": way,
                    "relc": [of_sites[site.name].relc for site in teacher.sites],
                    "doubling": [params[site.name].doubling[0] for site in teacher.sites],
                    "agreement": agreement(reference, first_output(EagerRunner(compiled), judges), labelled=True),
                }
            )
            print(name, rows[-1], flush=True)
    return rows


def divide(teacher: Teacher) -> tuple[Samples, Samples]:
    """Return the samples that may be fitted, and those that judge."""
    own, more = teacher.calibration[SELECTION:], max(COUNTS) - len(teacher.calibration) + SELECTION
    inputs = {name: torch.cat([value, teacher.held_out.inputs[name][:more]]) for name, value in own.inputs.items()}
    return Samples(inputs), teacher.held_out[more:]


def at_once(teacher: Teacher, fitting: Samples, selection: Samples) -> dict[str, SlicedDualParams]:
    """Fit all sites on the teacher's own activations."""
    return fits(teacher.graph, list(teacher.sites), fitting, selection)


def in_turn(teacher: Teacher, fitting: Samples, selection: Samples) -> dict[str, SlicedDualParams]:
    """Fit each site on what it gets from the sites before it, one pass by then."""
    params: dict[str, SlicedDualParams] = {}
    for number, site in enumerate(teacher.sites):
        before = teacher.sites[:number]
        graph, here = teacher.graph, site
        if before:
            graph = rewrite(teacher.graph, before, modules_of(before, params))
            here = find_sinkhorn(graph, teacher.calibration[:2]).sites[0]
        params[site.name] = fits(graph, [here], fitting, selection)[here.name]
    return params


def fits(graph: CapturedGraph, sites: list[Site], fitting: Samples, selection: Samples) -> dict[str, SlicedDualParams]:
    """Fit one pass at some sites of a graph."""
    params = calibrate(graph, {site.name: [FEATURES] for site in sites}, sites, fitting, selection, 0)
    return {site.name: params[FitKey(site.name, FEATURES)] for site in sites}


def modules_of(sites: tuple[Site, ...] | list[Site], params: dict[str, SlicedDualParams]) -> dict[str, nn.Module]:
    """Build one pass at some sites."""
    return {site.name: build(site, Candidate("sliced_dual", 1, 0.0, None, params[site.name])) for site in sites}


if __name__ == "__main__":
    main()
