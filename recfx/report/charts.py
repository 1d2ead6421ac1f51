"""Charts as SVG text, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Line", "bars", "lines"]

Line = tuple[Sequence[float], Sequence[float | None]]
SIZE, COLORS = (5.6, 3.0), ("#2a6f97", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#8d99ae")


def lines(title: str, curves: Mapping[str, Line], *, across: str = "step", diagonal: bool = False) -> str:
    """A chart of curves by name; what is None or not finite is a gap.

    Args:     across: what the horizontal axis shows.  diagonal: whether the line of equal values is drawn.
    """
    figure, axes = _axes(title)
    for (name, (x, y)), color in zip(curves.items(), COLORS * (1 + len(curves) // len(COLORS)), strict=False):
        numbers = [math.nan if value is None else float(value) for value in y]
        axes.plot(list(x), numbers, label=name, color=color, linewidth=1.4, marker="o" if len(numbers) < 30 else "",
                  markersize=3)  # fmt: skip
    if diagonal:
        axes.axline((0, 0), slope=1, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xlabel(across)
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def bars(title: str, values: Mapping[str, float], *, unit: str = "") -> str:
    """A chart of horizontal bars by name."""
    figure, axes = _axes(title)
    axes.barh(list(values), list(values.values()), color=COLORS[0])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    return _svg(figure)


def _axes(title: str) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "matplotlib: got no package of that name, expected it. It draws the charts of a report. Install it: pip "
            "install matplotlib."
        ) from error
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
