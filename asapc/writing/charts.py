"""Draws the charts of a report: each an image that a page holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asapc.pictures import (
    BLUE,
    INK,
    ORANGE,
    PAGE_SIZE,
    as_png,
    as_svg,
    decades,
    draw_dots,
    legend,
    new_figure,
    page_style,
)

MAX_SHOWN = 99.5  # percentile of a map's entries that has the strongest colour


def curve(front: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], limit: float | None) -> str | None:
    """Draw error against cost of a site's candidates, with the chosen one; None where there is none but the exact form.

    The exact form, whose error is rounding, is a line: its point would leave no room to tell the others apart.
    """
    points = [
        (c["estimated_ms"], c["calibration_relc"])
        for c in front
        if c["operator"] != "exact" and c["estimated_ms"] is not None and (c["calibration_relc"] or 0) > 0
    ]
    if not points:
        return None
    with page_style():
        figure = new_figure(PAGE_SIZE)
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=3.5)
        at = chosen["estimated_ms"], chosen["calibration_relc"]
        if at in points:
            axes.plot(*at, color=ORANGE, marker="D", markersize=7, linestyle="", label="chosen")
        exact = next((c["estimated_ms"] for c in front if c["operator"] == "exact"), None)
        if exact is not None:
            is_chosen = chosen["operator"] == "exact"
            axes.axvline(exact, color=ORANGE if is_chosen else INK, linestyle=":", label="exact")
        if limit:
            axes.axhline(limit, color=INK, linestyle="--", linewidth=1, label="budget")
        axes.set(yscale="log", xlabel="estimated ms", ylabel="relc on calibration samples")
        decades(axes, [error for _, error in points] + ([limit] if limit else []))
        legend(axes)
        return as_svg(figure)


def column_sums(columns: np.ndarray) -> str | None:
    """Draw the column sums (2, S, k) of the teacher's and the compiled plan on the first sample; None without any."""
    teacher, compiled = columns[:, 0]
    live = np.isfinite(teacher)
    if not live.any():
        return None
    order = np.argsort(teacher[live], kind="stable")
    with page_style():
        figure = new_figure(PAGE_SIZE)
        axes = figure.subplots()
        axes.axhline(1, color=INK, linestyle="--", linewidth=1, label="target")
        draw_dots(axes, range(len(order)), compiled[live][order], ORANGE, "compiled")
        axes.plot(teacher[live][order], color=BLUE, label="teacher")
        axes.set(xlabel="keys, by the teacher's sum", ylabel="column sum")
        legend(axes)
        return as_svg(figure)


def scatter(dual: np.ndarray) -> str | None:
    """Draw the points (2, P) of a true dual and its estimate; None without any."""
    true, predicted = dual[:, np.isfinite(dual).all(axis=0)]
    if not len(true):
        return None
    with page_style():
        figure = new_figure(PAGE_SIZE)
        axes = figure.subplots()
        ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
        axes.plot(ends, ends, color=INK, linestyle="--", linewidth=1, label="equal")
        draw_dots(axes, true, predicted, BLUE, "a point")
        axes.set(xlabel="true dual", ylabel="estimate")
        legend(axes)
        return as_svg(figure)


def maps(teacher: np.ndarray, compiled: np.ndarray) -> dict[str, Any]:
    """Draw two maps (n, m) of one sample with one scale of square roots, and their difference with its own scale."""
    teacher, compiled = (np.nan_to_num(values.astype(np.float32)) for values in (teacher, compiled))
    difference = compiled - teacher
    teacher, compiled = (np.sqrt(values.clip(0)) for values in (teacher, compiled))
    most = max(float(np.percentile(teacher, MAX_SHOWN)), 1e-9)
    off = max(float(np.percentile(np.abs(difference), MAX_SHOWN)), 1e-9)
    return {
        "teacher": as_png(teacher, "viridis", 0, most),
        "compiled": as_png(compiled, "viridis", 0, most),
        "difference": as_png(difference, "PuOr_r", -off, off),
        "most": most**2,
        "off": off,
    }
