"""What memory and time calibration takes, by the number of tokens: sums are kept, so that memory should not grow.

    python -m benchmarks.calibration
    torchrun --nproc-per-node 2 -m benchmarks.calibration --tokens 100000

On a point-set transformer with random weights. Each number of tokens runs in a process of its own, whose largest memory
is compared with that of the smallest number. Under torchrun one number is calibrated, shared out. Writes
benchmarks/results/calibration.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from asapc.commands.study import study_module
from asapc.models.pointset import PointTransformer
from asapc.planning.calibrate import calibrate
from asapc.planning.distributed import processes
from asapc.training.shapes import POINTS, point_sets
from asapc.types.choices import FeatureSet
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "calibration.json"
TOKENS = (10_000, 100_000, 1_000_000)
SELECTION, CLOSURE_STEPS = 16, 1
FEATURES = FeatureSet(pieces=8)


def main() -> None:
    """Calibrate in processes of their own, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="number of tokens to calibrate with, in this process")
    tokens = parser.parse_args().tokens
    if tokens is not None:
        with processes() as rank:
            row = measure(tokens)
            if rank == 0:
                print(json.dumps(row))
        return
    rows = []
    for count in TOKENS:
        command = [sys.executable, "-m", "benchmarks.calibration", "--tokens", str(count)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    more = rows[-1]["peak_gigabytes"] - rows[0]["peak_gigabytes"]
    print(f"{TOKENS[-1]:,} tokens take {more:.2f} GB more than {TOKENS[0]:,}")
    write_json(RESULTS, {"rows": rows, "more_gigabytes": more, "environment": environment(seed=0)})


def measure(tokens: int) -> dict[str, Any]:
    """Calibrate on a number of tokens, and say what that took."""
    torch.manual_seed(0)
    model = PointTransformer(iterations=10).eval()
    samples = Samples({"points": point_sets(-(-tokens // POINTS), seed=0)[0]})
    teacher = study_module(model, samples[:2])
    sites = teacher.sites
    before = peak()
    start = time.perf_counter()
    calibrate(teacher.graph, {s.name: [FEATURES] for s in sites}, sites, samples, samples[:SELECTION], CLOSURE_STEPS)
    return {
        "tokens": len(samples) * POINTS,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gigabytes_before": before,
        "peak_gigabytes": peak(),
    }


def peak() -> float:
    """Return the largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
