"""Runs cases of the study, one by one or several at once."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from benchmarks.study.teachers import Row


def prepare() -> None:
    """Prepare a process for measuring."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sharp plans are full of them, and they are slow


def done(cases: Mapping[str, Callable[[], Row]], processes: int) -> Iterator[tuple[str, Row, float]]:
    """Run cases, and yield the name, the row and the seconds of each as it is done."""
    if processes == 1 or len(cases) < 2:
        for case, run in cases.items():
            yield case, *timed(run)
        return
    # A fork of a process with torch's threads may hang.
    with ProcessPoolExecutor(processes, get_context("spawn"), prepare) as pool:
        jobs = {pool.submit(timed, run): case for case, run in cases.items()}
        for job in as_completed(jobs):
            yield jobs[job], *job.result()


def timed(run: Callable[[], Row]) -> tuple[Row, float]:
    """Run a case, and return its row and the seconds that it took."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start
