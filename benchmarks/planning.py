"""How long a plan takes for a model of 12 layers, 197 tokens, and 8 heads of 64, with random weights.

    python -m benchmarks.planning

Queries and keys are scaled up so that scores are as sharp as in trained teachers. Writes
benchmarks/results/planning.json.
"""

import argparse
import resource
import time
from collections import Counter
from pathlib import Path

import torch

from asapc.commands.study import study_module
from asapc.config import CompileConfig
from asapc.events import Timed
from asapc.models.blocks import Block
from asapc.planning.choose import choose
from asapc.planning.costs import shipped
from asapc.types.samples import Samples
from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.attention import encoder

RESULTS = Path(__file__).resolve().parent / "results" / "planning.json"
WIDTH, HEADS, TOKENS, CALIBRATION, HELD_OUT, SEED = 512, 8, 197, 64, 32, 0
SHARPENED = 2.0  # queries and keys each


def main() -> None:
    """Time capture, find and select, print them, write the JSON."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(SEED)
    module = encoder(WIDTH, HEADS)
    for block in module:
        assert isinstance(block, Block)
        with torch.no_grad():
            block.attention.qkv.weight[: 2 * WIDTH] *= SHARPENED
    tokens = torch.randn(CALIBRATION + HELD_OUT, TOKENS, WIDTH)
    samples, held_out = Samples({"input": tokens[:CALIBRATION]}), Samples({"input": tokens[CALIBRATION:]})
    timed = Timed(lambda event: None)
    teacher = study_module(module, samples, held_out, on_event=timed)
    start = time.perf_counter()

    def advance(detail: str) -> None:
        print(f"{time.perf_counter() - start:7.1f} s  {detail}", flush=True)

    selection = choose(teacher, CompileConfig(), shipped(), advance)
    select_seconds = time.perf_counter() - start
    row = {
        "layers": len(teacher.sites),
        "tokens": TOKENS,
        "samples": [CALIBRATION, HELD_OUT],
        "capture_seconds": round(timed.seconds["capture"], 1),
        "find_seconds": round(timed.seconds["find"], 1),
        "select_seconds": round(select_seconds, 1),
        "chosen": Counter(choice.candidate.operator for choice in selection.choices.values()),
        "repairs": selection.repairs,
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": torch.get_num_threads(),
    }
    print(row)
    write_json(RESULTS, {**row, "environment": environment(SEED)})


if __name__ == "__main__":
    main()
