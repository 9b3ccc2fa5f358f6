"""Kills a tiny compilation at random moments: what breaks, lives on, or is left behind?

    python -m benchmarks.kills --kills 100

Each round replaces an output folder and is killed by SIGKILL, SIGTERM or SIGINT. Afterwards the folder must be whole,
possibly by the next run, no child may live, and once the next run has begun nothing may be left beside the output or in
the temporary folder.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from asapc.models.vit import VisionTransformer
from asapc.process.scratch import sweep
from asapc.writing.folder import PREFIX, restore

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RESULT = Path(__file__).parent / "results" / "kills.json"


def main() -> None:
    """Run the rounds and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Background jobs of a shell ignore it, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_model(place / "tiny.pt")
        (place / "temporary").mkdir()
        start = time.perf_counter()
        assert run(place).wait() == 0, "the compilation itself fails"
        seconds = time.perf_counter() - start
        rounds = []
        for number in range(options.kills):
            rounds.append(kill(place, SIGNALS[number % len(SIGNALS)], draw.uniform(0, seconds)))
            print(json.dumps(rounds[-1]), flush=True)
    counts = {
        key: sum(r[key] for r in rounds) for key in ("ended_before", "broken", "alive", "leftovers", "wrong_code")
    }
    RESULT.write_text(
        json.dumps({"kills": options.kills, "seed": options.seed, **counts, "rounds": rounds}, indent=1) + "\n"
    )


def write_model(path: Path) -> None:
    """Write an untrained model of 16 tokens as a checkpoint."""
    torch.manual_seed(0)
    arguments = {"size": 4, "classes": 3, "width": 8, "depth": 1, "heads": 2, "epsilon": 0.25, "iterations": 20}
    content = {
        "format": "asapc.checkpoint/1",
        "model": "asapc.models.vit:VisionTransformer",
        "model_args": arguments,
        "state_dict": VisionTransformer(**arguments).state_dict(),
        "calibration": {"inputs": {"images": torch.rand(16, 4, 4)}},
        "held_out": {"inputs": {"images": torch.rand(8, 4, 4)}, "labels": torch.arange(8) % 3},
    }
    torch.save(content, path)


def run(place: Path) -> "subprocess.Popen[bytes]":
    """Start the compilation, in a session of its own so that its children can be told from others."""
    options = ["--out", "out", "--force", "--batch", "1", "--seconds", "0.05", "--threads", "1", "--quiet"]
    return subprocess.Popen(
        [sys.executable, "-m", "asapc", "compile", "tiny.pt", *options, "--fidelity", "relc<=1"],
        cwd=place,
        env={**os.environ, "TMPDIR": str(place / "temporary")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(place: Path, number: signal.Signals, delay: float) -> dict[str, object]:
    """Run one round: 1 where something is wrong."""
    process = run(place)
    time.sleep(delay)
    ended_before = process.poll() is not None
    process.send_signal(number)
    code = process.wait()
    time.sleep(0.1)  # the kernel ends the children of a killed process a moment later
    alive = len(list(of_session(process.pid)))
    # What the next run does first.
    sweep(place, PREFIX, restore)
    sweep(place / "temporary", "asapc.")
    left = [path.name for path in place.iterdir() if path.name not in ("tiny.pt", "out", "temporary")]
    left += [path.name for path in (place / "temporary").iterdir()]
    # Before Python begins and after it has ended the signal itself kills, which a shell shows as the same code.
    expected = (-number, 128 + number, *([0] if ended_before else []))
    return {
        "signal": number.name,
        "delay": round(delay, 3),
        "code": code,
        "ended_before": int(ended_before),
        "broken": int(not whole(place / "out")),
        "alive": alive,
        "leftovers": len(left),
        "wrong_code": int(code not in expected),
    }


def of_session(number: int) -> Iterator[int]:
    """Yield the processes of a session that live, on Linux."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == number and fields[0] != "Z":
            yield int(folder.name)


def whole(folder: Path) -> bool:
    """Return whether a folder has the files of its manifest, with their hashes, and no others."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    except (OSError, ValueError):
        return False
    names = {"manifest.json", *files}
    return {path.name for path in folder.iterdir()} == names and all(
        hashes[name] == files[name]["sha256"] for name in files
    )


if __name__ == "__main__":
    main()
