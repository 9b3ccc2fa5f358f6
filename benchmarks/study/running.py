"""Runs cases of the study in processes, by lanes: the cases of a lane share its processes."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from typing import TypeVar

import torch

from benchmarks.study.teachers import Row

Key = TypeVar("Key")
Cases = Mapping[Key, Callable[[], Row]]


def prepare() -> None:
    """Prepare a process for measuring."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sharp plans are full of them, and they are slow


def done(*lanes: tuple[Cases[Key], int]) -> Iterator[tuple[Key, Row, float]]:
    """Run the cases of all lanes, and yield the key, the row and the seconds of each as it is done.

    Args:
        lanes: cases, which are begun in their order, and how many of them run at once.
    """
    jobs: dict[Future[tuple[Row, float]], Key] = {}
    with ExitStack() as stack:
        for cases, processes in lanes:
            pool = ProcessPoolExecutor(processes, get_context("spawn"), prepare)  # forks of torch's threads may hang
            stack.callback(pool.shutdown, cancel_futures=True)  # where one fails, none is begun after it
            jobs |= {pool.submit(timed, run): key for key, run in cases.items()}
        for job in as_completed(jobs):
            yield jobs[job], *job.result()


def timed(run: Callable[[], Row]) -> tuple[Row, float]:
    """Run a case, and return its row and the seconds that it took."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start
