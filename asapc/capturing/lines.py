"""Finds the line of the user's own code among the frames of torch and asapc."""

import contextlib
import os
import sys
import traceback
from pathlib import Path
from types import FrameType

import torch

from asapc.errors import first_line

TORCH = str(Path(torch.__file__).parent) + os.sep  # not other packages whose names begin with torch
OWN = str(Path(__file__).parents[1]) + os.sep
MODELS = str(Path(OWN) / "models") + os.sep  # what users write would stand in such files


def user_frame() -> FrameType:
    """Return the innermost frame outside torch and this folder: the line that asks."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, str(Path(__file__).parent))):
        frame = frame.f_back
    return frame


def told(error: BaseException) -> str:
    """Return the first line of an error's message, with the innermost line of the user's code that it passed."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((TORCH, "<", contextlib.__file__))
        and (frame.filename.startswith(MODELS) or not frame.filename.startswith(OWN))
    ]
    return first_line(error) + (f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else "")
