"""The two kinds of pictures: a confusion matrix as PNG, and curves as SVG that takes its colours from the page."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from case_fast.optional import needed

# matplotlib draws with these; `curve_svg` replaces them with names that the page's style sheet defines, light and dark.
_SVG_COLOURS = {
    "#010101": "currentColor", "#020202": "var(--grid)", "#030303": "var(--accent)", "#040404": "var(--faint)",
    "#050505": "var(--second)",
}
_INK, _GRID, _ACCENT, _FAINT, _SECOND = _SVG_COLOURS
_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.unicode_minus": False}


def confusion_png(counts: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """Draw counts (rows: true emotion, columns: predicted) as shares of each row; a row without examples stays grey."""
    matplotlib = needed("matplotlib", "the picture of a confusion matrix")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(total == 0, counts.shape), counts / np.maximum(total, 1))
    size = max(6.0, 0.33 * len(names) + 2.2)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#e6e6e6")
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    ticks = np.arange(len(names))
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, [f"{name} ({int(n):,})" for name, n in zip(names, total[:, 0], strict=True)])
    axes.set_xticks(ticks[1:] - 0.5, minor=True)
    axes.set_yticks(ticks[1:] - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = shares[row, column]
        if share >= 0.045:
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5,
                      color="white" if share > 0.55 else "#1b2a3a")
    for place in ticks:  # right predictions lie in the frames
        corner = (place - 0.5, place - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#9a6700", linewidth=0.9, zorder=3))
    axes.set_xlabel("predicted emotion", fontsize=11, labelpad=8)
    axes.set_ylabel("true emotion (examples)", fontsize=11, labelpad=8)
    axes.set_title(title, fontsize=13, pad=12, loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=30, pad=0.015, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.set_label("share of the row")
    bar.outline.set_visible(False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", pad_inches=0.15)
    os.replace(temporary, path)


@dataclass
class Curve:
    """One small chart.

    Attributes:
        title: what the vertical axis shows; the horizontal one is always the training step.
        x, y: the points, in order of x; y may hold NaN.
        marked: (x, y) of a point to point out, and what to call it.
        level: a horizontal line to compare with, and what to call it.
        smooth: draw the points faintly and their running mean on top.
    """

    title: str
    x: Sequence[float]
    y: Sequence[float]
    marked: tuple[float, float, str] | None = None
    level: tuple[float, str] | None = None
    smooth: bool = False
    points: int = field(default=400, repr=False)  # drawn at most; more are averaged in blocks


def running_mean(y: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the points around each point, narrower at both ends; NaN is left out."""
    half = max(1, len(y) // 40)
    known = np.isfinite(y)
    sums = np.concatenate([[0], np.cumsum(np.where(known, y, 0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(np.arange(len(y)) - half, 0)
    end = np.minimum(np.arange(len(y)) + half + 1, len(y))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])


def _thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= points:
        return x, y
    blocks = np.array_split(np.arange(len(x)), points)
    finite = [block[np.isfinite(y[block])] for block in blocks]
    return (np.array([x[block].mean() for block in blocks]),
            np.array([y[block].mean() if len(block) else np.nan for block in finite]))


def curve_svg(curve: Curve, name: str) -> str:
    """An ``<svg>`` element for direct use in a page; ``name`` keeps its ids apart from those of other charts.

    Its colours are ``currentColor`` and the variables --grid, --accent, --faint and --second.
    """
    matplotlib = needed("matplotlib", "a curve of the report")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    x, y = _thin(np.asarray(curve.x, dtype=np.float64), np.asarray(curve.y, dtype=np.float64), curve.points)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.7, 2.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.set_title(curve.title, loc="left", color=_INK, fontsize=10, fontweight="bold")
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(colors=_INK, length=0, labelsize=8.5)
        axes.set_xlabel("step", color=_INK, fontsize=8.5, loc="right")
        axes.locator_params(axis="both", nbins=5)
        if curve.smooth and len(x) >= 40:
            axes.plot(x, y, color=_FAINT, linewidth=0.8)
            axes.plot(x, running_mean(y), color=_ACCENT, linewidth=1.8)
        else:
            axes.plot(x, y, color=_ACCENT, linewidth=1.8, marker="o" if len(x) < 40 else None, markersize=3.5)
        if curve.level is not None:
            value, label = curve.level
            axes.axhline(value, color=_SECOND, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", ha="right", va="bottom", color=_SECOND, fontsize=8)
        if curve.marked is not None:
            at, value, label = curve.marked
            axes.plot([at], [value], marker="o", color=_SECOND, markersize=6, linestyle="none")
            low, high = axes.get_xlim()
            align = "right" if at > (low + high) / 2 else "left"
            away = -13 if value <= np.nanmin(y) else 7  # on the side of the curve where it is not
            axes.annotate(label, (at, value), xytext=(0, away), textcoords="offset points", ha=align, color=_SECOND,
                          fontsize=8.5)
            axes.margins(y=0.2)
        stream = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    return _embed(stream.getvalue(), name, curve.title)


def _embed(svg: str, name: str, title: str) -> str:
    """Only the element itself, its ids made unique, its colours the page's, its size the page's choice."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # a style in a page would hold for all of it
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', svg)
    for colour, variable in _SVG_COLOURS.items():
        svg = svg.replace(colour, variable)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{body}'
