"""Pictures that commands draw, with matplotlib where it is installed."""

from pathlib import Path
from typing import Any

from asapc.errors import DependencyError

SUFFIXES = (".png", ".svg", ".pdf")
SIZE = 7, 6  # inches


def new_figure() -> Any:
    """Return an empty figure of matplotlib, which needs no screen.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError("matplotlib is not installed", 'pip install "asapc[plot]"') from None
    return Figure(figsize=SIZE, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's suffix."""
    figure.savefig(path, format=path.suffix[1:].lower() or "png", dpi=120)
