"""Captures models without their automatic casts: ONNX Runtime's CPU has no products of bfloat16."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from asapc.capturing.compare import run
from asapc.errors import CaptureError, SamplesError
from asapc.loading.lines import TORCH
from asapc.types.samples import Samples


@contextmanager
def without_casts() -> Iterator[list[str]]:
    """Let `torch.autocast`, in all its forms, do nothing; casts that code writes itself stay.

    Yields:
        Where automatic casts would have begun, as "file:line"; it grows meanwhile.
    """
    places: list[str] = []

    def enter(region: torch.autocast) -> torch.autocast:
        if region._enabled and (place := caller()) not in places:
            places.append(place)
        return region

    def leave(region: torch.autocast, *error: Any) -> bool:
        return False

    with patch.multiple(torch.autocast, __enter__=enter, __exit__=leave):
        yield places


def caller() -> str:
    """Return the "file:line" of the code that enters a region, or of the function that has one as its decorator."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(TORCH) and frame.f_back is not None:
        if frame.f_code.co_name == "decorate_autocast":
            function: Callable[..., Any] = frame.f_locals["func"]
            return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def check_uncast(module: nn.Module, example: Samples, places: Sequence[str]) -> None:
    """Raise CaptureError where a model does not run without the automatic casts that begin at some places.

    Tracing does not see it: the types of a product's factors are compared only when it is computed.
    """
    if not places:
        return
    try:
        with without_casts():
            run(module, example, example)
    except SamplesError as error:
        raise CaptureError(
            f"without the automatic casts of {', '.join(places)}, which no compiled model has, {error}",
            "within torch.autocast, leave out the casts that the forward writes itself, or undo them with .float()",
        ) from error
