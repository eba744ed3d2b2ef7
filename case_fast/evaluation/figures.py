"""The pictures: a confusion matrix and a diagnosis as PNG, and curves as SVG that takes its colours from the page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from case_fast.files import png_of, write_bytes
from case_fast.optional import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_bytes(path, png_of(figure, dpi=110, bbox_inches="tight", pad_inches=0.15))


_OURS, _OTHER, _LIMIT, _PALE = "#2563a8", "#7fb0e6", "#b45309", "#5a6573"  # of a diagnosis


def diagnosis_png(found: Mapping[str, Any], limits: Mapping[str, float], title: str, path: Path) -> None:
    """Draw what `case_fast.diagnosis.diagnose` found, a panel for each of its parts.

    Args:
        limits: what counts as healthy: "alike" (most of a common share), "narrow" (most of a prior's ratio), "aligned" (least of
            top-1 over chance).
    """
    needed("matplotlib", "the picture of a diagnosis")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    vectors, choices, alignments, gradients = (found.get(name, {}) for name in ("vectors", "choices", "alignments", "gradients"))
    swaps = {name: of for name, of in found.get("swaps", {}).items() if name != "own"}
    panels = [draw for there, draw in (
        (vectors, lambda axes: _bars(
            axes, "Share of the common vector (effective rank)", list(vectors),
            {"": [of["common_share"] for of in vectors.values()]}, limits["alike"],
            texts=[f"{of['common_share']:.3f} ({of['effective_rank']:.1f})" for of in vectors.values()])),
        (choices, lambda axes: _bars(
            axes, "Perplexity over the number", list(choices),
            {kind: [of[f"{kind}_ratio"] for of in choices.values()] for kind in ("prior", "posterior")}, limits["narrow"])),
        (alignments, lambda axes: _bars(
            axes, "Top-1 over chance", list(alignments),
            {side: [of[side]["over_chance"] for of in alignments.values()] for side in ("affection", "cognition")},
            limits["aligned"])),
        (gradients, lambda axes: _bars(
            axes, "Gradient norm by loss, shared encoders", list(gradients),
            {"": [max(norm, 1e-6) for norm in gradients.values()]}, None, "log", [f"{norm:.2g}" for norm in gradients.values()])),
        ("gate" in found, lambda axes: _quantiles(axes, "Gate mu", found["gate"]["quantiles"])),
        (swaps, lambda axes: _bars(
            axes, "Rise of the perplexity with another's, %", list(swaps), {"": [of["rise"] for of in swaps.values()]}, None,
            texts=[f"{of['rise']:+.2f} ± {2 * of['rise_error']:.2f}" for of in swaps.values()],
            errors=[2 * of["rise_error"] for of in swaps.values()])),
    ) if there]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for place, draw in enumerate(panels):
        draw(figure.add_subplot(rows, 2, place + 1))
    _save(figure, path)


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9)


def _bars(axes: Axes, title: str, names: Sequence[str], series: Mapping[str, Sequence[float]], limit: float | None,
          scale: str = "linear", texts: Sequence[str] = (), errors: Sequence[float] | None = None) -> None:
    """Horizontal bars of one or two series, their values at the right edge; ``limit``: where health begins or ends; ``errors``:
    half a whisker each."""
    _panel(axes, title)
    places, height = np.arange(len(names)), 0.8 / len(series)
    for turn, (label, values) in enumerate(series.items()):
        shown = np.nan_to_num(np.asarray(values, dtype=np.float64))
        at = places + (turn - (len(series) - 1) / 2) * height
        axes.barh(at, shown, height, color=(_OURS, _OTHER)[turn], label=label, xerr=errors, ecolor=_PALE)
        for place, text in zip(at, texts or [f"{value:.2f}" for value in values], strict=True):
            axes.annotate(text, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8, color=_PALE)
    if limit is not None:
        axes.axvline(limit, color=_LIMIT, linewidth=1, linestyle=(0, (4, 3)))
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
    axes.set_xscale(scale)
    if scale == "linear":
        axes.locator_params(axis="x", nbins=6)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.4 * (high - low) if scale == "linear" else high * 50)  # room for the values
    axes.set_yticks(places, names)
    axes.invert_yaxis()


def _quantiles(axes: Axes, title: str, quantiles: Mapping[str, float]) -> None:
    _panel(axes, title)
    axes.plot(list(quantiles.values()), [float(share) for share in quantiles], color=_OURS, marker="o", markersize=4)
    for share, value in quantiles.items():
        axes.annotate(f"{value:.2f}", (value, float(share)), xytext=(7, -3), textcoords="offset points", fontsize=8, color=_PALE)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("mu: share of the concepts' side", fontsize=8.5, color=_PALE)
    axes.set_ylabel("share of dialogues below", fontsize=8.5, color=_PALE)


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
