"""How long it takes to study and plan one site of a long sequence, and how much memory.

    python -m benchmarks.long_sequences                      # 256, 1,024 and 4,096 tokens
    python -m benchmarks.long_sequences --lengths 256 1024

A point-set transformer of one block and two heads, with random weights that are scaled up so that its scores are as
sharp as in trained teachers; 12 samples to fit and 4 held out. Each length runs in a process of its own, whose peak is
the memory. Writes benchmarks/results/long_sequences.json.
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch

from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.events import Timed
from asapc.models.pointset import PointTransformer
from asapc.planning.choose import choose
from asapc.planning.costs import shipped
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "long_sequences.json"
WIDTH, HEADS, CALIBRATION, HELD_OUT, SEED = 64, 2, 12, 4, 0
SHARPENED = 2.0  # queries and keys each


def main() -> None:
    """Time each length, print the rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    rows = []
    for length in parser.parse_args().lengths:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measured, (length,)))
        print(rows[-1], flush=True)
    write_json(RESULTS, {"rows": rows, "environment": environment(SEED)})


def measured(length: int) -> dict[str, Any]:
    """Study and plan one length."""
    torch.manual_seed(SEED)
    module = PointTransformer(width=WIDTH, heads=HEADS, depth=1)
    with torch.no_grad():
        module.blocks[0].attention.qkv.weight[: 2 * WIDTH] *= SHARPENED  # type: ignore[index, union-attr]
    points = torch.randn(CALIBRATION + HELD_OUT, length, 3)
    samples, held_out = Samples({"points": points[:CALIBRATION]}), Samples({"points": points[CALIBRATION:]})
    timed = Timed(lambda event: None)
    teacher = study_module(module, samples, held_out, on_event=timed)
    start = time.perf_counter()
    choose(teacher, CompileConfig(), shipped())
    return {
        "tokens": length,
        "half_steps": teacher.sites[0].loop.half_steps,
        "capture_seconds": round(timed.seconds["capture"], 1),
        "find_seconds": round(timed.seconds["find"], 1),
        "select_seconds": round(time.perf_counter() - start, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    main()
