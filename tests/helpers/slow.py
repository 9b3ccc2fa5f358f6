"""Marks what `make test` leaves to `make test-all`: what takes long and has a quicker sibling."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One case of a parametrised test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_beyond(cases: Iterable[Any], every: int = 2) -> list[Any]:
    """Cases of a parametrised test, each of one value; one in so many of them is left to `make test`."""
    return [case if number % every == 0 else slow(case) for number, case in enumerate(cases)]
