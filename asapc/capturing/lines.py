"""Finds the line of the user's own code among the frames of torch and asapc."""

import contextlib
import os
import sys
import traceback
from pathlib import Path
from types import FrameType

import torch

from asapc.errors import one_line

TORCH = str(Path(torch.__file__).parent) + os.sep  # not other packages whose names begin with torch
INSTALLED = str(Path(torch.__file__).parents[1]) + os.sep
OWN = str(Path(__file__).parents[1]) + os.sep
MODELS = str(Path(OWN) / "models") + os.sep  # what users write would stand in such files


def user_frame() -> FrameType:
    """Return the innermost frame outside torch and this folder: the line that asks."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, str(Path(__file__).parent))):
        frame = frame.f_back
    return frame


def told(error: BaseException) -> str:
    """Return an error's message on one line, with the innermost line of the user's code that it passed.

    Installed packages count only where nothing else does: a model may call them, or be one.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((TORCH, "<", contextlib.__file__))
        and (frame.filename.startswith(MODELS) or not frame.filename.startswith(OWN))
    ]
    own = [frame for frame in frames if not frame.filename.startswith(INSTALLED)] or frames
    return one_line(error) + (f" ({own[-1].filename}:{own[-1].lineno})" if own else "")
