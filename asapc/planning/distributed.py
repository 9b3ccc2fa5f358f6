"""Shares the work of calibration and training among the processes that torchrun starts.

Each takes a share of the samples, and their sums are added up; nothing else leaves a process. Outside of `processes`
asapc runs in one, even if the program that calls it has a process group of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist
from torch import Tensor

from asapc.errors import SamplesError
from asapc.types.samples import Samples

# Of this context alone, so that calls from a program with a process group of its own never wait for other processes.
several: ContextVar[bool] = ContextVar("several", default=False)


@contextmanager
def processes() -> Iterator[int]:
    """Join the processes that torchrun started and yield the rank of this one, 0 where there are no others."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield 0
        return
    dist.init_process_group("gloo")  # sums lie in CPU memory
    token = several.set(True)
    try:
        yield dist.get_rank()
    finally:
        several.reset(token)
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, 0 for the first or where there are no others."""
    return dist.get_rank() if several.get() else 0


def share(samples: Samples) -> Samples:
    """Return the samples that this process takes.

    Raises:
        SamplesError: there are more processes than samples.
    """
    if not several.get():
        return samples
    if len(samples) < processes_sharing():
        raise SamplesError(
            f"{processes_sharing()} processes cannot share {len(samples)} samples",
            "give more samples, or start fewer processes",
        )
    return samples[rank() :: processes_sharing()]


def processes_sharing() -> int:
    """Return how many processes share the samples."""
    return dist.get_world_size() if several.get() else 1


def total(sums: Tensor) -> Tensor:
    """Add up the sums that all processes took over their shares."""
    if not several.get():
        return sums
    everywhere = sums.clone()  # all_reduce writes in place
    dist.all_reduce(everywhere)
    return everywhere
