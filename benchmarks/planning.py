"""How long a plan takes for a model of 12 layers, 197 tokens, and 8 heads of 64, with random weights.

    python -m benchmarks.planning

Queries and keys are scaled up so that scores are as sharp as in trained teachers. Writes
benchmarks/results/planning.json.
"""

import argparse
import resource
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch

from asapc.capturing.capture import capture
from asapc.commands.teacher import find
from asapc.config import CompileConfig
from asapc.models.vit import Block
from asapc.planning.choose import plan
from asapc.types.model import LoadedModel
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.attention import encoder

RESULTS = Path(__file__).resolve().parent / "results" / "planning.json"
WIDTH, HEADS, TOKENS, CALIBRATION, HELD_OUT, SEED = 512, 8, 197, 64, 32, 0
SHARPENED = 2.0  # queries and keys each


def main() -> None:
    """Time capture, find and plan, print them, write the JSON."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(SEED)
    module = encoder(WIDTH, HEADS)
    for block in module:
        assert isinstance(block, Block)
        with torch.no_grad():
            block.attention.qkv.weight[: 2 * WIDTH] *= SHARPENED
    tokens = torch.randn(CALIBRATION + HELD_OUT, TOKENS, WIDTH)
    samples, held_out = Samples({"input": tokens[:CALIBRATION]}), Samples({"input": tokens[CALIBRATION:]})
    times = [time.perf_counter()]
    graph = capture(LoadedModel(module.eval(), Path("model.pt"), "", 0, None, None), samples)
    times.append(time.perf_counter())
    sites = find(graph, samples).sites
    times.append(time.perf_counter())

    def advance(detail: str) -> None:
        print(f"{time.perf_counter() - times[-1]:7.1f} s  {detail}", flush=True)

    chosen = plan(graph, sites, samples, held_out, CompileConfig(), advance)
    times.append(time.perf_counter())
    capture_seconds, find_seconds, plan_seconds = (after - before for before, after in pairwise(times))
    row = {
        "layers": len(sites),
        "tokens": TOKENS,
        "samples": [CALIBRATION, HELD_OUT],
        "capture_seconds": round(capture_seconds, 1),
        "find_seconds": round(find_seconds, 1),
        "plan_seconds": round(plan_seconds, 1),
        "chosen": Counter(choice.candidate.operator for choice in chosen.choices.values()),
        "repairs": chosen.repairs,
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": torch.get_num_threads(),
    }
    print(row)
    write_json(RESULTS, {**row, "environment": environment(SEED)})


if __name__ == "__main__":
    main()
