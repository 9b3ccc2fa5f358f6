"""Says where in the user's own code an error came up: among the frames of Python, torch and asapc."""

import os
import sysconfig
import traceback
from pathlib import Path

import torch

from asapc.errors import one_line

TORCH = str(Path(torch.__file__).parent) + os.sep  # not other packages whose names begin with torch
INSTALLED = str(Path(torch.__file__).parents[1]) + os.sep
PYTHON = sysconfig.get_path("stdlib") + os.sep
OWN = str(Path(__file__).parents[1]) + os.sep
MODELS = str(Path(OWN) / "models") + os.sep  # what users write would stand in such files
ON_CPU = (
    "asapc runs models on the CPU: leave out .cuda(), and make new tensors where the inputs are, as in "
    "torch.zeros(3, device=x.device)"
)


def told(error: BaseException) -> str:
    """Return an error's message on one line, with the innermost line of the user's code that it passed.

    Installed packages count only where nothing else does: a model may call them, or be one.
    """
    files = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    frames = [(file, line) for file, line in files if not is_machinery(file)]
    own = [(file, line) for file, line in frames if not file.startswith(INSTALLED)] or frames
    return one_line(error) + (f" ({own[-1][0]}:{own[-1][1]})" if own else "")


def remedy(error: BaseException, otherwise: str) -> str:
    """Return what to do about an error of the user's code: leave out the GPU where it asks for one."""
    return ON_CPU if "cuda" in str(error).lower() else otherwise


def is_machinery(file: str) -> bool:
    """Return whether a file is of torch, of Python, or of asapc itself."""
    of_python = file.startswith(PYTHON) and not file.startswith(INSTALLED)
    of_asapc = file.startswith(OWN) and not file.startswith(MODELS)
    return of_python or of_asapc or file.startswith((TORCH, "<"))
