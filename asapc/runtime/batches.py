"""Dynamic batching for servers whose loop is asyncio: what waits at the same time is computed as one batch."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Arrays = Mapping[str, np.ndarray]


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Request:
    """Inputs that wait for their outputs."""

    inputs: Arrays
    answer: asyncio.Future[Arrays] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(next(iter(self.inputs.values())))

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """The shapes without the batch, which those in one batch share."""
        return tuple(array.shape[1:] for array in self.inputs.values())


class Batches:
    """Computes requests, one batch after the other, each in a thread.

    A batch takes requests of the same lengths from the oldest on. They gather while the batch before is computed, and
    for `delay` after the first came. Where a batch fails, its requests are computed one by one, so that none suffers
    from another.

    Args:
        compute: returns outputs by name for inputs that the model is known to take; the first axis of all is the batch.
        most: samples in one batch; 1 where the first axes are no batch, which leaves requests alone.
        delay: seconds.
        limit: requests that may wait.
    """

    def __init__(self, compute: Callable[[Arrays], Arrays], most: int, delay: float, limit: int) -> None:
        self.compute, self.most, self.delay, self.limit = compute, most, delay, limit
        self.waiting: deque[Request] = deque()
        self.task: asyncio.Task[None] | None = None

    async def __call__(self, inputs: Arrays) -> Arrays:
        """Return the outputs of one request by name.

        Raises:
            QueueFull: it may not wait.
            Exception: as `compute` raised it for this request.
        """
        if len(self.waiting) >= self.limit:
            raise QueueFull
        request = Request(inputs)
        self.waiting.append(request)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.work())
        return await request.answer

    async def work(self) -> None:
        """Compute batches until nothing waits."""
        if self.most > 1:
            await asyncio.sleep(self.delay)
        while batch := self.take():
            await self.answer(batch)

    def take(self) -> list[Request]:
        """Return the requests of the next batch, which wait no longer; those that were given up are dropped."""
        waiting = [request for request in self.waiting if not request.answer.done()]
        batch: list[Request] = []
        for request in waiting:
            alike = not batch or (self.most > 1 and request.lengths == batch[0].lengths)
            if alike and (not batch or sum(one.size for one in batch) + request.size <= self.most):
                batch.append(request)
        self.waiting = deque(request for request in waiting if request not in batch)
        return batch

    async def answer(self, batch: list[Request]) -> None:
        """Compute one batch, and set the answers."""
        try:
            if len(batch) == 1:
                parts = [await asyncio.to_thread(self.compute, batch[0].inputs)]
            else:
                parts = await asyncio.to_thread(self.compute_together, batch)
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    await self.answer([request])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for request, part in zip(batch, parts, strict=True):
            if not request.answer.done():
                request.answer.set_result(part)

    def compute_together(self, batch: list[Request]) -> list[Arrays]:
        """Return the outputs of several requests, computed as one batch."""
        names = batch[0].inputs
        outputs = self.compute({name: np.concatenate([request.inputs[name] for request in batch]) for name in names})
        ends = np.cumsum([request.size for request in batch])[:-1]
        parts = zip(*(np.split(array, ends) for array in outputs.values()), strict=True)
        return [dict(zip(outputs, part, strict=True)) for part in parts]
