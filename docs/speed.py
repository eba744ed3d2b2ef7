"""Draws docs/speed.png, the picture of the README, from the stored results of one machine.

    python docs/speed.py [--machine xeon] [--out docs/speed.png]

A row a family of kernels, a dot a measured case: the time of the fastest peer divided by ours. The size of a batch of the paper
is named with both times. Forward and backward where a case has both, else forward (decoding).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

ROOT = Path(__file__).resolve().parents[1]
# Family -> the case that stands for a batch of the paper, and its name in words; families in the order of the rows.
NAMED = {
    "graph_attention": ("paper", "16 graphs of 84 vertices"),
    "cross_attention": ("step16", "the next word of 16 replies"),
    "bilinear_mim": ("fine", "1 280 inferences with 64 reactions"),
    "linear_cross_entropy": ("480x24000", "480 words of a vocabulary of 24 000"),
}
INK, PALE, OURS, GRID = "#1f2328", "#6e7781", "#0969da", "#d8dee4"


def measured(machine: str) -> tuple[dict[str, list[dict]], dict]:
    """Family -> a line for each case (case, ours_ms, best_peer_ms, ratio), and the environment of the newest run."""
    families, environments = {}, []
    for family in NAMED:
        found = json.loads((ROOT / "benchmarks" / "results" / machine / f"{family}.json").read_text(encoding="utf-8"))
        cases = {}
        for line in found["summary"]:  # forward comes before forward+backward, which replaces it
            cases[line["case"]] = line
        families[family] = list(cases.values())
        environments.append(found["environment"])
    return families, max(environments, key=lambda environment: environment["date"])


def time(ms: float) -> str:
    return f"{ms:.2f} ms" if ms < 1 else f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"


def draw(machine: str, out: Path) -> None:
    families, environment = measured(machine)
    figure = Figure(figsize=(8, 3.5), dpi=160, facecolor="white")  # a card of its own: readable on a dark page too
    axes = figure.subplots()
    axes.axvspan(0.1, 1, color="#f6f8fa", zorder=0)
    axes.axvline(1, color=INK, linewidth=1)
    for row, (family, cases) in enumerate(families.items()):
        case, words = NAMED[family]
        axes.axhline(row, color=GRID, linewidth=1, zorder=1)
        axes.scatter([line["ratio"] for line in cases], [row] * len(cases), s=26, color=PALE, alpha=0.6, linewidth=0, zorder=2)
        named = next(line for line in cases if line["case"] == case)
        axes.scatter(named["ratio"], row, s=80, color=OURS, zorder=3)
        text = f"{words}: {time(named['ours_ms'])}, best peer {time(named['best_peer_ms'])}"
        axes.annotate(text, (named["ratio"], row), (0, 9), textcoords="offset points", fontsize=8.5, color=OURS,
                      ha="left" if named["ratio"] < 2 else "right" if named["ratio"] > 4.5 else "center")
    axes.set_yticks(range(len(families)), families, fontsize=10, color=INK, family="monospace")
    axes.set_ylim(len(families) - 0.6, -0.7)
    axes.set_xscale("log")
    axes.set_xlim(0.6, 7)
    axes.xaxis.set_major_locator(FixedLocator([0.7, 1, 1.5, 2, 3, 4, 5]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.tick_params(colors=INK, length=0)
    axes.tick_params(axis="x", labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("Time of the fastest peer / time of case_fast, a dot a measured case", loc="left", fontsize=11, color=INK)
    cpu = environment["machine"]["cpu"].replace("(R)", "").removesuffix(" Processor")
    found = f"{environment['machine']['cores']} cores of an {cpu}, torch {environment['versions']['torch']}, float32"
    figure.text(0.99, 0.015, f"{found}, {environment['date'][:10]}", ha="right", fontsize=8, color=PALE)
    figure.text(0.01, 0.015, "left of the line: slower than the fastest peer", fontsize=8, color=PALE)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="xeon", help="folder of benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.png")
    given = parser.parse_args()
    draw(given.machine, given.out)
