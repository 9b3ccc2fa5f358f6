"""Requests that wait at the same time are computed as one batch, and none suffers from another."""

import asyncio
import threading

import numpy as np
import pytest

from asapc.runtime.batches import Batches, QueueFull


class Doubling:
    """Doubles its input and keeps the sizes of its batches; negative numbers it refuses; it may be held up."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, inputs):
        self.go.wait(10)
        self.sizes.append(len(inputs["x"]))
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return {"y": 2 * inputs["x"], "sums": inputs["x"].sum(axis=1)}


def row(value: float, batch: int = 1, length: int = 3):
    return {"x": np.full((batch, length), value)}


def run(batches: Batches, requests) -> list:
    async def together():
        return await asyncio.gather(*map(batches, requests), return_exceptions=True)

    return asyncio.run(together())


def test_each_request_gets_its_own_outputs():
    compute = Doubling()
    requests = [row(value, batch) for value, batch in zip(range(6), (1, 2, 1, 3, 1, 2), strict=True)]
    for request, answer in zip(requests, run(Batches(compute, 8, 0.01, 100), requests), strict=True):
        np.testing.assert_array_equal(answer["y"], 2 * request["x"])
        np.testing.assert_array_equal(answer["sums"], request["x"].sum(axis=1))
    assert compute.sizes == [8, 2]


def test_only_the_same_lengths_share_a_batch_and_larger_requests_go_alone():
    compute = Doubling()
    requests = [row(1, 1, 3), row(2, 1, 4), row(3, 1, 3), row(4, 20, 3), row(5, 1, 4)]
    for request, answer in zip(requests, run(Batches(compute, 8, 0.01, 100), requests), strict=True):
        np.testing.assert_array_equal(answer["y"], 2 * request["x"])
    assert compute.sizes == [2, 2, 20]


def test_without_batching_each_is_computed_alone():
    compute = Doubling()
    assert len(run(Batches(compute, 1, 0.01, 100), [row(1), row(2), row(3, 2)])) == 3
    assert compute.sizes == [1, 1, 2]


def test_an_error_reaches_who_caused_it_alone():
    first, second, third = run(Batches(Doubling(), 8, 0.01, 100), [row(1), row(-1), row(3)])
    assert isinstance(second, ValueError)
    assert (first["y"][0, 0], third["y"][0, 0]) == (2, 6)


def test_beyond_the_limit_requests_are_refused_and_the_others_answered():
    answers = run(Batches(Doubling(), 8, 0.01, 3), [row(value) for value in range(5)])
    assert [isinstance(answer, QueueFull) for answer in answers] == [False] * 3 + [True] * 2
    assert [answer["y"][0, 0] for answer in answers[:3]] == [0, 2, 4]


def test_requests_that_were_given_up_are_not_computed():
    compute = Doubling()
    batches = Batches(compute, 8, 0, 100)

    async def scenario():
        compute.go.clear()
        first = asyncio.create_task(batches(row(1)))
        await asyncio.sleep(0.05)  # it is being computed
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batches(row(2)), 0.05)
        compute.go.set()
        last = await batches(row(3))
        return (await first)["y"][0, 0], last["y"][0, 0]

    assert asyncio.run(scenario()) == (2, 6)
    assert compute.sizes == [1, 1]
