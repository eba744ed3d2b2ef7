"""What `case-fast diagnose` shows of a run: the figures of `case_fast.diagnosis` as table, JSON and picture.

    OUT/diagnosis.json    every figure, settings of the model, store, seconds
    OUT/diagnosis.png     the same drawn
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from case_fast import __version__
from case_fast.data import open_store
from case_fast.diagnosis import diagnose
from case_fast.errors import ConfigError
from case_fast.evaluation.evaluate import check
from case_fast.evaluation.figures import diagnosis_png
from case_fast.files import plain, require_folder_place, write_json
from case_fast.optional import MissingPackage, needed
from case_fast.runs import Run, load_model

if TYPE_CHECKING:
    from rich.table import Table

_log = logging.getLogger("case_fast")

# What counts as healthy: rules of thumb, with their reasons in docs/diagnose.md.
ALIKE = 0.99  # common share, at most
NARROW = 0.7  # perplexity of a prior over the number of its rows, at most
ALIGNED = 3.0  # top-1 over chance, at least
DROWNED = 0.01  # gradient of a loss over that of the whole, at least
STANDARD_ERRORS = 2.0  # that the perplexity rises by, at least


@dataclass(frozen=True)
class Row:
    """A figure in words: its name, its value, what it stands beside, what is healthy, and whether it is (None: no rule)."""

    name: str
    value: str
    beside: str = ""
    healthy: str = ""
    well: bool | None = None


def diagnose_run(run: str | Path, data: str | Path, split: str = "valid", out: str | Path | None = None, batches: int = 16,
                 device: str = "auto", checkpoint: str = "best", progress: Callable[[str], None] = lambda what: None
                 ) -> tuple[dict[str, Any], list[Path]]:
    """Diagnose a run on a split and write the files of this module, into RUN/diagnosis/SPLIT unless ``out`` names a folder.

    Args:
        batches: of 16 dialogues, no two of one conversation.
        checkpoint: "best", or the step of one of the run's checkpoints.

    Returns:
        what diagnosis.json holds, and the files, it first.

    Raises:
        ConfigError: no such split, a model of other words than the store's, or one that has nothing to diagnose.
        CheckpointError, DataError: a part of the run or of the store is missing or damaged.
        PlaceError: the files cannot be written; found before the work, as far as it is so by then.
    """
    if batches < 1:
        raise ConfigError(f"batches must be at least 1, not {batches}")
    store = open_store(data)
    model, chosen = load_model(run, device, checkpoint)
    check(model, store, split)
    folder = Run(run).diagnosis(split) if out is None else Path(out)
    require_folder_place(folder)
    found = {
        "run": str(run), "checkpoint": checkpoint, "store": {"path": str(store.path), "fingerprint": store.fingerprint},
        "version": __version__, "model": model.config.as_dict(),
        **diagnose(model, store, split, batches, device=chosen, progress=progress),
    }
    files = [folder / "diagnosis.json", folder / "diagnosis.png"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(files[0], plain(found))
    files[1].unlink(missing_ok=True)  # that of an earlier diagnosis
    try:
        diagnosis_png(found, {"alike": ALIKE, "narrow": NARROW, "aligned": ALIGNED}, _title(found), files[1])
    except MissingPackage as error:
        _log.warning("%s. diagnosis.png is left out", error)
    return found, [file for file in files if file.is_file()]


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['model']['model']}, {found['dialogues']:,} dialogues of {found['split']} (weights: {found['checkpoint']})"


def rows(found: Mapping[str, Any]) -> Iterator[list[Row]]:
    """Every figure of `diagnose` in words, part by part."""
    yield [row for name, of in found.get("vectors", {}).items() for row in (
        Row(f"{name}: common share", f"{of['common_share']:.4f}", f"of {of['rows']:,} rows", f"< {ALIKE}",
            of["common_share"] < ALIKE),
        Row(f"{name}: effective rank", f"{of['effective_rank']:.1f}", f"of {min(of['rows'], of['width'])}", "well above 1"),
    )]
    yield [
        Row(f"{name}: {kind}", f"{of[f'{kind}_perplexity']:.1f} = {of[f'{kind}_ratio']:.2f} x", f"of {of['number']:.1f}",
            f"<= {NARROW} x", of[f"{kind}_ratio"] <= NARROW)
        for name, of in found.get("choices", {}).items() for kind in ("prior", "posterior")
    ]
    yield [
        Row(f"{name}: {side}", f"{of[side]['top1']:.4f} = {of[side]['over_chance']:.1f} x",
            f"chance {of[side]['chance']:.4f}", f">= {ALIGNED:g} x", of[side]["over_chance"] >= ALIGNED)
        for name, of in found.get("alignments", {}).items() for side in ("affection", "cognition")
    ]
    gradients = dict(found.get("gradients", {}))
    whole = gradients.pop("loss", 0.0)
    yield [Row("gradient: whole loss", f"{whole:.3g}")] * bool(gradients) + [
        Row(f"gradient: {name}", f"{norm:.3g}", f"{norm / whole if whole else 0:.2g} x whole", f">= {DROWNED} x",
            norm >= DROWNED * whole)
        for name, norm in gradients.items()
    ]
    if gate := found.get("gate"):
        low, *_, high = gate["quantiles"].values()
        yield [Row("gate mu", f"{gate['mean']:.3f} ± {gate['std']:.3f}", f"90 %: {low:.2f}-{high:.2f}", "not all alike")]
    yield [
        Row("own knowledge" if name == "own" else f"another's {name}", f"{of['ppl']:.2f}" + _accuracy(of),
            *(() if name == "own" else (f"{of['rise']:+.2f} ± {of['rise_error']:.2f} %", f"> {STANDARD_ERRORS:g} errors",
                                        _is_read(of))))
        for name, of in found.get("swaps", {}).items()
    ]


def _accuracy(of: Mapping[str, Any]) -> str:
    return "" if of["accuracy"] is None else f", acc {100 * of['accuracy']:.1f} %"


def _is_read(swap: Mapping[str, Any]) -> bool:
    return swap["rise"] > STANDARD_ERRORS * swap["rise_error"]


def answers(found: Mapping[str, Any]) -> list[str]:
    """The two questions, as far as the model can be asked them: does it read its knowledge, does the alignment align?"""
    swaps = {name: of for name, of in found.get("swaps", {}).items() if name != "own"}
    aligned = {name: of["affection"]["over_chance"] for name, of in found.get("alignments", {}).items()}
    lines = []
    if swaps:
        said = ", ".join(f"{name} {'yes' if _is_read(of) else 'no'} ({of['rise']:+.2f} %)" for name, of in swaps.items())
        lines.append(f"Is its knowledge read? By the perplexity with another dialogue's: {said}.")
    if aligned:
        said = ", ".join(f"{name} {'yes' if of >= ALIGNED else 'no'} ({of:.1f} x chance)" for name, of in aligned.items())
        lines.append(f"Does the alignment align? {said}.")
    return lines


def table(found: Mapping[str, Any]) -> Table:
    """The table of a terminal; green and red: healthy and not."""
    Text = needed("rich.text", "a table in the terminal").Text
    shown = needed("rich.table", "a table in the terminal").Table(
        title=f"Diagnosis of {_title(found)}", title_justify="left", box=needed("rich.box", "a table in the terminal").SIMPLE_HEAD
    )
    for name in ("figure", "value", "beside", "healthy"):
        shown.add_column(name, no_wrap=name == "figure")
    colours = {True: "green", False: "red", None: ""}
    for part in rows(found):
        for row in part:
            shown.add_row(row.name, Text(row.value, style=colours[row.well]), row.beside, Text(row.healthy, style="dim"))
        shown.add_section()
    return shown
