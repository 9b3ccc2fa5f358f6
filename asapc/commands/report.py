"""`asapc report`: a compiled folder's report again, as it was printed, and as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asapc.errors import AsapcError, CheckpointError, one_line
from asapc.loading.folder import read_folder
from asapc.loading.manifest import COMPILE
from asapc.loading.untrusted.source import Source
from asapc.loading.untrusted.tensors import read_npz
from asapc.writing.html import FIGURES, render
from asapc.writing.report import CompileReport

# Axes of the arrays that figures are drawn from, and the longest that each may be.
AXES = {"head": (), "teacher": (4, 256, 256), "compiled": (4, 256, 256), "columns": (2, 4, 1024), "dual": (2, 10_000)}


def read_report(folder: Path) -> CompileReport:
    """Read the report of a compiled folder, after checking the whole folder.

    Raises:
        CheckpointError: the folder is not whole, or was written by another version of asapc.
    """
    return CompileReport(folder, read_folder(folder))


def render_report(report: CompileReport) -> str:
    """Draw the page of a report again, from what lies in its folder.

    Raises:
        CheckpointError: the arrays beside the report are not those of figures.
    """
    try:
        return render(report.data, read_figures(report.folder, report.data))
    except AsapcError:
        raise
    except Exception as error:  # numbers that no compilation gives, from a report that somebody else wrote
        raise CheckpointError(f"cannot draw the report of {report.folder}: {one_line(error)}", COMPILE) from error


def read_figures(folder: Path, report: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the arrays that figures are drawn from; none where the folder has none.

    Raises:
        CheckpointError: they cannot be read, or are others.
    """
    if not (folder / FIGURES).exists():
        return {}
    source = Source.at(folder / FIGURES, CheckpointError)
    arrays = {name: tensor.numpy() for name, tensor in read_npz(source).items()}
    for name, array in arrays.items():
        number, _, kind = name.partition(".")
        longest = AXES.get(kind)
        if not number.isdecimal() or int(number) >= len(report["sites"]) or longest is None:
            raise source.refuse(f"it holds {name[:80]!r}, which no figure shows", COMPILE)
        fits = array.ndim == len(longest) and all(0 < n <= most for n, most in zip(array.shape, longest, strict=True))
        if not fits or array.dtype.kind not in "fi":
            raise source.refuse(f"its {name} is no array of a figure: {array.dtype} {array.shape}", COMPILE)
    return arrays
