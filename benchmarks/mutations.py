"""What mutated files of every format do: each is to be refused in one line, or read as torch's strict load reads it.

    python -m benchmarks.mutations                # 10,000 files
    python -m benchmarks.mutations --files 1000

The files are those of docs/loading.md, damaged in their bytes, rearranged, or written anew with other entries, other
opcodes, or a call in them. They are read in other processes, and their weights are compared, bit for bit, with what
torch, safetensors, transformers or onnx find in the same file; one file in COMMAND_EVERY goes through the whole command
`asapc inspect` too. Counts what becomes of the files of each format, and all that must not happen: tracebacks, more or
less than one error and one hint, code that ran, other weights, more than TIME_LIMIT seconds, and more memory than ten
times the file and BASE. Writes benchmarks/results/mutations.json, and exits with 1 where any of that happened.
"""

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from asapc.writing.environment import environment
from asapc.writing.folder import write_json
from benchmarks.hostile import BASE, MAX_RATIO, ROOT, TIME_LIMIT, run

sys.path.insert(0, str(ROOT / "tests"))
from helpers.mutations import READ, Tree, mutate, whole
from helpers.references import check, check_command

RESULTS = ROOT / "benchmarks" / "results" / "mutations.json"
SEED = 0
COMMAND_EVERY = 20
CHUNK = 50  # files in one process: a new one for each would take most of the time
OUTCOMES = ("refused", "read", "read in part")


def main() -> None:
    """Read the files, count what becomes of them, write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    formats: dict[str, Counter[str]] = {format_.name: Counter() for format_ in READ}
    commands: Counter[str] = Counter()
    largest, failures = 0, []
    for number, format_ in enumerate(READ):
        rng, tree = random.Random(f"{options.seed} {format_.name}"), whole(format_)
        count = options.files // len(READ) + (number < options.files % len(READ))
        mutated = [mutate(tree, rng) for _ in range(count)]
        for look, every, counter in ((check, 1, formats[format_.name]), (check_command, COMMAND_EVERY, commands)):
            for outcome, growth in outcomes(partial(look, format_), mutated[::every]):
                counter[outcome] += 1
                largest = max(largest, growth)
                if outcome not in OUTCOMES:
                    failures.append({"format": format_.name, "by": look.__name__, "problems": outcome})
                    print(failures[-1], flush=True)
        print(format_.name, dict(formats[format_.name]), flush=True)
    counts = sum(formats.values(), Counter())
    print(dict(counts), f"through the command: {dict(commands)}", f"largest growth {largest / 2**20:.0f} MiB")
    facts = {"files": counts.total(), "counts": counts, "formats": formats, "commands": commands, "failures": failures}
    limits = {"largest_growth_bytes": largest, "base_bytes": BASE, "ratio": MAX_RATIO, "seconds": TIME_LIMIT}
    write_json(RESULTS, {**facts, **limits, "environment": environment(options.seed)})
    raise SystemExit(1 if failures else 0)


def outcomes(look: Callable[[Tree], str], trees: list[Tree]) -> Iterator[tuple[str, int]]:
    """Yield for each tree what becomes of it, or what must not happen, and by how much memory grew.

    A process reads CHUNK of them, or fewer where one goes wrong: the next begins behind that.
    """
    with tempfile.NamedTemporaryFile() as scratch:
        while trees:
            chunk = trees[:CHUNK]

            def read(chunk: list[Tree] = chunk) -> None:
                with open(scratch.name, "w") as file:
                    for tree in chunk:
                        signal.alarm(TIME_LIMIT)
                        print(look(tree), file=file, flush=True)

            idle = run(lambda: None)[2]  # a child begins with the memory of its parent
            _, problems, peak = run(read)
            results = Path(scratch.name).read_text().splitlines()
            growth = max(peak - idle, 0)
            if growth > MAX_RATIO * min(sum(map(len, tree.values())) for tree in chunk) + BASE:
                problems.append("memory")
            if problems:
                results = [*results[: len(chunk) - 1], " ".join(problems)]
            yield from ((outcome, growth) for outcome in results)
            trees = trees[len(results) :]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
