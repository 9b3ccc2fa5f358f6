"""Pictures, drawn with matplotlib, which is imported here alone."""

import base64
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".svg", ".pdf")
SIZE = 7, 6  # inches
PAGE_SIZE = 3.4, 2.5  # of a chart on a page that is read on a phone
# On a page, colours follow the reader's light or dark scheme. matplotlib knows fixed colours alone, so that each of
# these stands for a variable. The series are told apart by colour-blind people, in both schemes.
INK, GRID, BLUE, ORANGE = "#010203", "#020304", "#030405", "#040506"
SCHEMES = {
    INK: ("ink", "#3b434b", "#c3cbd4"),
    GRID: ("grid", "#dde2e7", "#343b43"),
    BLUE: ("blue", "#0069b4", "#58b0ec"),
    ORANGE: ("orange", "#c24a00", "#ff9d4d"),
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "asapc",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


def new_figure(size: tuple[float, float] = SIZE) -> Any:
    """Return an empty figure of matplotlib, which needs no screen."""
    # Where its cache cannot be written it makes one for this run, and says so at every run.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's suffix."""
    figure.savefig(path, format=path.suffix[1:].lower() or "png", dpi=120)


def page_style() -> Any:
    """Return a context in which charts for a page are drawn."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import rc_context

    return rc_context(STYLE)


def legend(axes: Any) -> None:
    """Say what is what in a line above a chart, where nothing is hidden."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, fontsize=8, ncols=3, columnspacing=1.2)


def draw_dots(axes: Any, x: Any, y: Any, colour: str, label: str) -> None:
    """Draw points as one path, strokes of no length with round ends, since each marker takes a line of SVG."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Lines

    corners = [(a, b) for a, b in zip(x, y, strict=True) for _ in range(2)]
    codes = [Lines.MOVETO, Lines.LINETO] * len(x)
    axes.add_patch(PathPatch(Lines(corners, codes), capstyle="round", edgecolor=colour, linewidth=3, alpha=0.7))
    axes.update_datalim(corners)
    axes.autoscale_view()
    axes.plot([], [], color=colour, marker="o", markersize=3, linestyle="", label=label)


def decades(axes: Any, values: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers: at every decade, or between them too where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    few = max(values) / min(values) < 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1e-3 else f"{value:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def as_svg(figure: Any) -> str:
    """Return a chart as the address of an image that holds it, in the colours of the reader's scheme."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    for colour, (name, _, _) in SCHEMES.items():
        text = text.replace(colour, f"var(--{name})")
    light, dark = (";".join(f"--{scheme[0]}:{scheme[i]}" for scheme in SCHEMES.values()) for i in (1, 2))
    rule = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    return address(text.replace('<style type="text/css">', f'<style type="text/css">{rule}', 1).encode(), "svg+xml")


def as_png(values: Any, colours: str, low: float, high: float) -> str:
    """Return a matrix as the address of an image of as many pixels, by a colour map of matplotlib from low to high."""
    from matplotlib import colormaps
    from PIL import Image

    image = Image.fromarray(((values - low) * (255 / (high - low))).clip(0, 255).round().astype("uint8"))
    image.putpalette(colormaps[colours](range(256), bytes=True)[:, :3].tobytes())
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return address(file.getvalue(), "png")


def address(content: bytes, kind: str) -> str:
    """Return the address of an image that is its own content."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
