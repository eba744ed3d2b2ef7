"""What `case-fast import` does: look at a release, and make a store of it as `prepare` does."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from case_fast.data.empathetic_dialogues import SPLITS
from case_fast.data.prepare import Material, PrepareSettings, Progress, Stages, prepare
from case_fast.data.store import Store
from case_fast.errors import DataError
from case_fast.importing.released import Imported, read_released


def import_release(settings: PrepareSettings, stages: Stages | None = None) -> Store:
    """Make a store of the release at ``settings.dialogues``: its splits, dialogues, labels and inferences.

    A text whose inferences the release does not hold is inferred by ``settings.knowledge``, or has none without it.

    Raises:
        As of `read_released` and `prepare`; DataError: a split without a usable example.
    """
    return prepare(settings, stages, _material)


def _material(settings: PrepareSettings, progress: Progress | None) -> Material:
    found = read_released(settings.dialogues, settings.features.inferences_per_relation, progress)
    for split in SPLITS:
        if split not in found.splits:
            raise DataError(found.path, f"a store has a part {split}, of which there is no file", "Complete the folder")
        found.splits[split].report.require_rows("dialogues of EmpatheticDialogues, with its emotions")
    return found.material


def check(path: str, limit: int, stages: Stages) -> Imported:
    """Read a release and write nothing; ``limit``: inferences that a store keeps of a text and relation."""
    with stages.stage("Reading") as progress:
        return read_released(path, limit, progress)


def show(found: Imported, console: Console) -> None:
    """What there is, what was left out and why, what is missing."""
    head = f"{found.path}: {found.layout}; {found.size / 2**20:,.1f} MiB, {found.identity}"
    console.print(head, highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, header_style="bold")
    for name in ("split", "examples", "left out", "conversations", "turns", "sentences cut", "with inferences"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, part in found.splits.items():
        left_out = part.report.read - part.report.rows
        numbers = (part.report.read, left_out, part.conversations, part.turns, part.sentences, part.with_inferences)
        table.add_row(split, *(f"{number:,}" for number in numbers))
    console.print(table)
    if any(read for read, _ in found.relations.values()):
        table = Table(box=None, header_style="bold")
        for name in ("relation", "in the file", "kept, each text once"):
            table.add_column(name, justify="left" if name == "relation" else "right")
        for relation, (read, kept) in found.relations.items():
            table.add_row(relation, f"{read:,}", f"{kept:,}")
        console.print(table)
    for report in found.material.reports:
        console.print(f"  {report.summary()}", highlight=False, markup=False, soft_wrap=True)
    for what in found.missing:
        console.print(f"  missing: {what}", highlight=False, markup=False, soft_wrap=True)
