"""Draws the learning curves of runs side by side, as in docs/results.md.

    python docs/curves.py --out docs/run.png "default=ed.run" "as printed=printed.run"

One panel a figure: perplexity and emotion accuracy on the validation split, both alignments against chance, both priors
against their number, and each loss of training (running means), over the steps of all phases; a line a run, whose label stands
before the =.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from case_fast.evaluation.figures import running_mean
from case_fast.runs import Record

INK, GRID, LINES = "#1f2328", "#d8dee4", ("#0969da", "#bc4c00", "#6e7781", "#8250df")
VALIDATION = {
    "ppl": ("validation perplexity", None),
    "accuracy": ("validation emotion accuracy", None),
    "coarse_over_chance": ("L_coarse: top-1 over chance", 3),
    "fine_over_chance": ("L_fine: top-1 over chance", 3),
    "inferences_prior_ratio": ("prior over inferences: perplexity / number", 0.7),
    "concepts_prior_ratio": ("prior over vertices of G_EC: perplexity / number", 0.7),
}
LOSSES = {"bow": "L_BOW", "kl": "L_KL", "coarse": "L_coarse", "fine": "L_fine", "emotion": "L_emo", "generation": "L_gen",
          "diversity": "L_div"}


def draw(runs: dict[str, Record], out: Path) -> None:
    figure = Figure(figsize=(11, 11), dpi=110, facecolor="white", layout="constrained")
    panels = iter(figure.subplots(5, 3).flat)
    for event, wanted in (("validation", VALIDATION), ("step", {name: (title, None) for name, title in LOSSES.items()})):
        for name, (title, limit) in wanted.items():
            axes = next(panels)
            for colour, (label, run) in zip(LINES, runs.items(), strict=False):
                steps, values = run.series(event, name)
                if not steps:
                    continue
                shown = running_mean(np.array(values)) if event == "step" else values
                axes.plot(steps, shown, color=colour, linewidth=1.5, marker="o" if event == "validation" else None,
                          markersize=3, label=label)
            if limit is not None:
                axes.axhline(limit, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:g} k")
            axes.set_title(title, loc="left", fontsize=9, color=INK)
            axes.grid(axis="y", color=GRID)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0, labelsize=8)
    for axes in panels:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower right", fontsize=10, frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = dict(run.split("=", 1) for run in given.runs)
    draw({label: Record.read(run) for label, run in runs.items()}, given.out)


if __name__ == "__main__":
    main()
