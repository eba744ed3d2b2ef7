"""A table as Markdown, LaTeX, JSON and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from case_fast.evaluation.metrics import format_value
from case_fast.files import png_of, write_bytes, write_json, write_text
from case_fast.optional import needed
from case_fast.tables.numbers import METRICS, PAPER_NOTE, Cell, Line, Table

HEADS = {"ppl_geometric": "PPL", "dist_1": "Dist-1", "dist_2": "Dist-2", "acc_1": "Acc"}
MARKS = ((0.01, "‡", r"\ddagger"), (0.05, "†", r"\dagger"))  # p below, in Markdown, in LaTeX


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write tableN.md, .tex, .json and .png into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table{table.number}.{kind}" for kind in ("md", "tex", "json", "png")]
    write_text(paths[0], markdown(table))
    write_text(paths[1], latex(table))
    write_json(paths[2], table.as_dict())
    picture(table, paths[3])
    return paths


def name_of(table: Table, line: Line) -> str:
    """The row's name, with its recipe where the table has the model in several."""
    same = [other for other in table.lines if (other.row.kind, other.row.ablation) == (line.row.kind, line.row.ablation)]
    return line.row.name if len(same) == 1 else f"{line.row.name} ({line.row.recipe})"


def _text(cell: Cell) -> str:
    """mean, or mean ± half of the interval."""
    over = cell.over
    return format_value(over.mean) if over.low is None else f"{format_value(over.mean)} ± {format_value(over.mean - over.low)}"


def _mark(cell: Cell, place: int) -> str:
    if cell.adjusted is None:
        return ""
    return next((mark[place] for mark in MARKS if cell.adjusted < mark[0]), "")


def _best(table: Table) -> dict[str, Line]:
    found = {}
    for name, better in METRICS.items():
        lines = [line for line in table.lines if name in line.cells]
        if lines:
            found[name] = (min if better == "lower" else max)(lines, key=lambda line: line.cells[name].over.mean)
    return found


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]:,}" if len(set(numbers)) == 1 else f"{min(numbers):,}-{max(numbers):,}"


def caption(table: Table) -> list[str]:
    seeds = sorted({len(line.seeds) for line in table.lines})
    spread = ("One seed: no interval." if seeds == [1] else
              "± is half of the 95 % interval over seeds (Student's t); a row of one seed has none.")
    tests = (f"† p < 0.05, ‡ p < 0.01 against CASE: {table.draws:,} permutations over conversations of the test split, adjusted "
             "by Holm's method over the rows.")
    paper = [PAPER_NOTE] if any(line.published for line in table.lines) else []
    return [f"Test split, {table.store['vocabulary']:,} words of vocabulary, greedy replies. {spread} {tests}", *paper]


def markdown(table: Table) -> str:
    arrows = {"lower": "↓", "higher": "↑"}
    heads = [f"{head} {arrows[METRICS[name]]}" for name, head in HEADS.items()]
    known = any(line.published for line in table.lines)
    lines = [f"# Table {table.number}", "",
             "| | seeds | steps | " + " | ".join(heads) + (" | published: PPL, Dist-1, Dist-2, Acc |" if known else " |"),
             "|---|---:|---:|" + "---:|" * len(heads) + "---|" * known]
    best = _best(table)
    for line in table.lines:
        cells = []
        for name in HEADS:
            text = _text(line.cells[name]) + _mark(line.cells[name], 1) if name in line.cells else ""
            cells.append(f"**{text}**" if best.get(name) is line else text)
        paper = ", ".join(format_value(line.published[name]) if name in line.published else "-" for name in HEADS)
        cells += [paper if line.published else ""] * known
        lines.append(" | ".join([f"| {name_of(table, line)}", str(len(line.seeds)), _span(line.steps), *cells]) + " |")
    for name, values in table.floors.items():
        cells = [format_value(values[metric]) if metric in values else "" for metric in HEADS]
        lines.append(" | ".join([f"| *{name}*", "", "", *cells, *[""] * known]) + " |")
    lines += ["", *caption(table)]
    lines += ["", "Left out:", "", *(f"- {text}" for text in table.left_out)] if table.left_out else []
    lines += ["", *(f"- `{signature}`" for signature in table.signatures.values())]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A booktabs table; the best value bold, published ones in parentheses."""
    arrows = {"lower": r"$\downarrow$", "higher": r"$\uparrow$"}
    heads = " & ".join(f"{head} {arrows[METRICS[name]]}" for name, head in HEADS.items())
    rows, best = [], _best(table)
    for line in table.lines:
        cells = []
        for name in HEADS:
            text = ""
            if name in line.cells:
                cell = line.cells[name]
                text = _text(cell).replace("±", r"$\pm$")
                text = rf"\textbf{{{text}}}" if best.get(name) is line else text
                text += f"$^{{{_mark(cell, 2)}}}$" if _mark(cell, 2) else ""
                text += rf" {{\scriptsize({format_value(line.published[name])})}}" if name in line.published else ""
            cells.append(text)
        rows.append(f"{_escaped(name_of(table, line))} & " + " & ".join(cells) + r" \\")
    floors = [f"\\textit{{{_escaped(name)}}} & " + " & ".join(
        format_value(values[metric]) if metric in values else "" for metric in HEADS) + r" \\"
        for name, values in table.floors.items()]
    text = " ".join(caption(table)).replace("†", r"$\dagger$").replace("‡", r"$\ddagger$").replace("±", r"$\pm$")
    text = text.replace("%", r"\%").replace("<", "$<$")
    return "\n".join([
        r"\begin{table}", r"\centering", r"\begin{tabular}{l" + "r" * len(HEADS) + "}", r"\toprule", rf"Model & {heads} \\",
        r"\midrule", *rows, *([r"\midrule", *floors] if floors else []), r"\bottomrule", r"\end{tabular}",
        rf"\caption{{{text}}}", r"\end{table}",
    ]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", r"\&").replace("_", r"\_").replace("%", r"\%")


_INK, _PALE, _OURS, _GRID = "#1f2328", "#6e7781", "#0969da", "#d8dee4"


def picture(table: Table, path: Path) -> None:
    """A panel a metric: a dot and its interval for each row, the published value as a ring, floors as dashed lines."""
    figure_class = needed("matplotlib.figure", "the picture of a table").Figure
    figure = figure_class(figsize=(3.1 * len(HEADS) + 1.6, 0.42 * len(table.lines) + 1.5), dpi=130, facecolor="white",
                          layout="constrained")
    names = [name_of(table, line) for line in table.lines]
    for place, (axes, (name, head)) in enumerate(zip(figure.subplots(1, len(HEADS), sharey=True), HEADS.items(), strict=True)):
        _panel(axes, table, name, f"{head} ({METRICS[name]} is better)")
        if not place:
            axes.set_yticks(range(len(names)), names, fontsize=9)
            axes.set_ylim(len(names) - 0.4, -0.6)
    note = ["ring: published, other vocabulary and inputs"] * any(line.published for line in table.lines) + ["dashed: floor"]
    figure.supxlabel("; ".join(note), x=0.99, ha="right", fontsize=7.5, color=_PALE)
    write_bytes(path, png_of(figure))


def _panel(axes: Any, table: Table, name: str, title: str) -> None:
    for place, line in enumerate(table.lines):
        axes.axhline(place, color=_GRID, linewidth=0.7, zorder=0)
        if name in line.published:
            axes.plot(line.published[name], place, "o", markersize=7, markerfacecolor="none", markeredgecolor=_PALE)
        if name in line.cells:
            over = line.cells[name].over
            if over.low is not None:
                axes.plot([over.low, over.high], [place, place], color=_OURS, linewidth=2)
            axes.plot(over.mean, place, "o", markersize=5, color=_OURS)
    for values in table.floors.values():
        if name in values:
            axes.axvline(values[name], color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(title, loc="left", fontsize=9, color=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
