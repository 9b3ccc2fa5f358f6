"""Marks what `make test` leaves to `make test-all`: tests, and cases, that take long."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Mark one case of a parametrised test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_beyond(cases: Iterable[Any], every: int = 2) -> list[Any]:
    """Mark cases of a parametrised test, each of one value, all but one in so many."""
    return [case if number % every == 0 else slow(case) for number, case in enumerate(cases)]
