"""What `score` found: tables in the terminal and in Markdown, JSON, a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from case_fast.evaluation.measures import GROUPS
from case_fast.evaluation.metrics import format_value
from case_fast.evaluation.score import Cell, Scores
from case_fast.files import plain, png_of, write_bytes, write_json, write_text
from case_fast.optional import needed

if TYPE_CHECKING:
    from rich.console import Console

MARKS = ((0.01, "‡"), (0.05, "†"))  # adjusted p below
_FILE_WIDTH = 1000  # characters of a line, at most
_ARROW = {"higher": " ↑", "lower": " ↓", None: ""}
NOTES = (
    "In brackets the 95 % interval, drawn over conversations. † p < 0.05, ‡ p < 0.01 that there is no difference, by Holm's "
    "method over the systems.",
    "Overlap with one reference says little of a reply that may be good in many ways, and empathy's figures are those of rough "
    "classifiers, whose accuracy stands in their signatures: only people who read the replies can tell.",
)


def write_scores(scores: Scores, folder: Path) -> list[Path]:
    """Write score.md, .json and .png into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"score.{kind}" for kind in ("md", "json", "png")]
    write_text(paths[0], markdown(scores))
    write_json(paths[1], plain(scores.as_dict()))
    write_bytes(paths[2], picture(scores))
    return paths


# ---- words


def value_of(cell: Cell) -> str:
    """A value with its interval."""
    return cell.metric.text + _between(cell, cell.low, cell.high)


def _between(cell: Cell, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    whole = isinstance(cell.metric.value, int)
    return f" [{', '.join(format_value(round(value) if whole else value) for value in (low, high))}]"


def difference_of(cell: Cell) -> str:
    """A difference to the first system, with its interval and mark."""
    found = cell.difference
    if found is None:
        return ""
    sign = "+" if found.value > 0 else ""
    mark = "" if cell.adjusted is None else next((mark for limit, mark in MARKS if cell.adjusted < limit), "")
    return f"{sign}{format_value(found.value)}{_between(cell, found.low, found.high)}{mark}"


def _heading(cells: list[Cell]) -> str:
    better = next((cell.metric.better for cell in cells if cell.metric.better), None)
    return cells[0].metric.title + _ARROW[better]


def _names(scores: Scores) -> list[str]:
    return [system["name"] for system in scores.systems]


def _groups(scores: Scores) -> Iterator[tuple[str, dict[str, list[Cell]]]]:
    for group, title in GROUPS.items():
        found = {name: cells for name, cells in scores.cells.items() if scores.groups[name] == group}
        if found:
            yield title, found


def _differ(scores: Scores) -> list[list[Cell]]:
    return [cells for cells in scores.cells.values() if any(cell.difference for cell in cells)]


def missing_of(scores: Scores) -> dict[str, list[str]]:
    """Why there is no value -> titles of the metrics."""
    found: dict[str, list[str]] = {}
    for cells in scores.cells.values():
        for cell, system in zip(cells, _names(scores), strict=True):
            if cell.metric.value is None:
                everywhere = len({one.metric.reason for one in cells}) == 1
                reason = cell.metric.reason if everywhere else f"{system}: {cell.metric.reason}"
                titles = found.setdefault(reason, [])
                if cell.metric.title not in titles:
                    titles.append(cell.metric.title)
    return found


def signatures_of(scores: Scores) -> list[str]:
    """Of every metric, each once."""
    return list(dict.fromkeys(cell.metric.signature for cells in scores.cells.values() for cell in cells
                              if cell.metric.value is not None))


def _sources(scores: Scores) -> Iterator[tuple[str, ...]]:
    for system in scores.systems:
        skipped = sum(system["skipped"].values())
        same = "" if system["matched"] is None else f"{system['matched']:,}"
        yield (system["name"], system["path"], system["form"], f"{system['replies']:,}", f"{system['conversations']:,}", same,
               f"{skipped:,}", system["sha256"][:12])


_SOURCE = ("System", "File", "Form", "Replies", "Conversations", "Contexts of the first", "Skipped", "sha256")


# ---- terminal


def show(scores: Scores, console: Console) -> None:
    """Print values, differences, what is missing and why, signatures."""
    Text = needed("rich.text", "a table in the terminal").Text
    Table = needed("rich.table", "a table in the terminal").Table
    names = _names(scores)

    def table(title: str, columns: list[str]) -> Any:
        console.print(Text(title, style="italic"))
        found = Table(box=None, pad_edge=False, header_style="bold")
        found.add_column("metric")
        for name in columns:
            found.add_column(Text(name), justify="right")
        return found

    def end(found: Any) -> None:
        if not console.is_terminal:  # a file has no edge to break cells at
            found.width = found.__rich_measure__(console, console.options.update_width(_FILE_WIDTH)).maximum
        console.print(found, soft_wrap=not console.is_terminal)
        console.print()

    values = table(f"Replies of {len(names)} system{'s' * (len(names) > 1)}", names)
    for group, found in _groups(scores):
        values.add_row(Text(group, style="bold"), *[""] * len(names))
        for name, cells in found.items():
            style = "dim" if scores.groups[name] == "overlap" else ""
            row = [f"  {_heading(cells)}", *map(value_of, cells)]
            values.add_row(*(Text(text, style=style) for text in row))
    end(values)
    for system in scores.systems[1:]:
        if not system["matched"]:
            console.print(Text(f"{system['name']} answers none of the contexts of {names[0]}", style="yellow"), soft_wrap=True)
    if differ := _differ(scores):
        counts = [f"{system['name']}\n{system['matched']:,} replies" for system in scores.systems[1:]]
        differences = table(f"Less {names[0]}, on replies to the same contexts", counts)
        for cells in differ:
            differences.add_row(Text(_heading(cells)), *(Text(difference_of(cell)) for cell in cells[1:]))
        end(differences)
    for note in NOTES:
        console.print(Text(note, style="dim"), soft_wrap=True)
    for reason, titles in missing_of(scores).items():
        console.print(Text(f"n/a  {', '.join(titles)}: {reason}"), soft_wrap=True)
    for signature in signatures_of(scores):
        console.print(Text(signature, style="dim"), soft_wrap=True)


# ---- files


def markdown(scores: Scores) -> str:
    """The text of score.md."""
    names = [_escaped(name) for name in _names(scores)]
    lines = ["# Scores", "", *_rows(_SOURCE, _sources(scores), left=3)]
    for group, found in _groups(scores):
        rows = ((_heading(cells), *map(value_of, cells)) for cells in found.values())
        lines += ["", f"## {group}", "", *_rows(("", *names), rows)]
    if differ := _differ(scores):
        rows = ((_heading(cells), *map(difference_of, cells[1:])) for cells in differ)
        lines += ["", f"## Less {names[0]}, on replies to the same contexts", "", *_rows(("", *names[1:]), rows)]
    if absent := missing_of(scores):
        lines += ["", "## Not measured", "", *(f"- {', '.join(titles)}: {_escaped(reason)}" for reason, titles in absent.items())]
    lines += ["", *(line for note in NOTES for line in (note, "")), f"{scores.draws:,} draws. Signatures:", ""]
    return "\n".join([*lines, *(f"- `{signature}`" for signature in signatures_of(scores))]) + "\n"


def _rows(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]], left: int = 1) -> list[str]:
    """A table of Markdown, its first columns to the left."""
    rule = "|" + "---|" * left + "---:|" * (len(heads) - left)
    return [_row(heads), rule, *(_row(tuple(map(_escaped, row))) for row in rows)]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


_INK, _PALE, _FIRST, _OTHER, _GRID = "#1f2328", "#6e7781", "#0969da", "#bc4c00", "#d8dee4"
_COLUMNS = 4


def picture(scores: Scores) -> bytes:
    """A PNG, a panel a metric: a dot and its interval for each system; filled where it differs from the first."""
    figure_class = needed("matplotlib.figure", "the picture of scores").Figure
    drawn = [cells for cells in scores.cells.values() if any(cell.metric.value is not None for cell in cells)]
    names = [name if len(name) <= 28 else f"{name[:27]}…" for name in _names(scores)]
    rows = -(-len(drawn) // _COLUMNS)
    figure = figure_class(figsize=(13, rows * (0.75 + 0.22 * len(names)) + 0.4), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(max(rows, 1), _COLUMNS, squeeze=False, sharey=True)
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, cells in zip(grid.flat, drawn, strict=False):
        axes.set_title(_heading(cells), loc="left", fontsize=8.5, color=_INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=7.5)
        axes.locator_params(axis="x", nbins=4)
        for place, cell in enumerate(cells):
            axes.axhline(place, color=_GRID, linewidth=0.7, zorder=0)
            if cell.metric.value is None:
                continue
            colour = _OTHER if place else _FIRST
            if cell.low is not None:
                axes.plot([cell.low, cell.high], [place, place], color=colour, linewidth=2)
            apart = not place or cell.adjusted is not None and cell.adjusted < MARKS[-1][0]
            axes.plot(cell.metric.value, place, "o", markersize=5.5, color=colour, markerfacecolor=colour if apart else "white")
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(names)), names, fontsize=8, color=_INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("lines: 95 %; filled: the first system, and what differs from it (p < 0.05)", x=0.99, ha="right", fontsize=8,
                     color=_PALE)
    return png_of(figure)
