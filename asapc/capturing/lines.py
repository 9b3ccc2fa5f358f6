"""Finds the line of the user's own code that asks something during capture."""

import sys
from pathlib import Path
from types import FrameType

from asapc.loading.lines import TORCH


def user_frame() -> FrameType:
    """Return the innermost frame outside torch and this folder: the line that asks."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, str(Path(__file__).parent))):
        frame = frame.f_back
    return frame
