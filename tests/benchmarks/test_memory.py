import subprocess
import sys

import pytest
from helpers.paths import ROOT

SIZE = 2**26


def printed(code: str) -> int:
    """What a process prints that allocates as told; bytes of one value are written as soon as they are there."""
    command = [sys.executable, "-c", f"from benchmarks.memory import growth\n{code}"]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_growth_is_what_the_work_held_at_its_peak():
    work = f"def work():\n    for _ in range(3):\n        b'x' * {SIZE}\n    return b'x' * {SIZE // 4}\n"
    assert printed(f"{work}print(growth(work))") == pytest.approx(SIZE, rel=0.05)


def test_what_was_held_before_does_not_count():
    before = f"kept, freed = b'x' * {SIZE}, b'x' * {4 * SIZE}\ndel freed\n"
    assert printed(f"{before}print(growth(lambda: b'x' * {SIZE}))") == pytest.approx(SIZE, rel=0.05)
