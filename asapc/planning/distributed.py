"""Calibration in the processes that torchrun starts: each takes a share of the samples, and sums are added up.

Nothing else leaves a process. Outside of `processes` there is but one, also where a program has a process group of its
own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist
from torch import Tensor

from asapc.errors import SamplesError
from asapc.types.samples import Samples

several: ContextVar[bool] = ContextVar("several", default=False)


@contextmanager
def processes() -> Iterator[int]:
    """Join the processes that torchrun started, and yield the rank of this one: 0 where there are no others."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield 0
        return
    dist.init_process_group("gloo")
    token = several.set(True)
    try:
        yield dist.get_rank()
    finally:
        several.reset(token)
        dist.destroy_process_group()


def share(samples: Samples) -> Samples:
    """The samples that this process takes.

    Raises:
        SamplesError: there are more processes than samples.
    """
    if not several.get():
        return samples
    if len(samples) < dist.get_world_size():
        raise SamplesError(
            f"{dist.get_world_size()} processes cannot share {len(samples)} samples",
            "give more samples, or start fewer processes",
        )
    return samples[dist.get_rank() :: dist.get_world_size()]


def total(sums: Tensor) -> Tensor:
    """A sum over the samples of all processes, from those over the shares."""
    if not several.get():
        return sums
    added = sums.clone()
    dist.all_reduce(added)
    return added
