"""Reading a run folder for its report: whatever is there, damaged lines counted, nothing required."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from case_fast.errors import CheckpointError, DataError
from case_fast.evaluation.evaluate import Evaluation
from case_fast.text_files import ReadReport, read_lines

Series = tuple[list[int], list[float]]
_SPLITS = ("test", "valid", "train")  # order of the report


@dataclass
class Run:
    """What a run folder holds.

    Attributes:
        manifest, config: RUN/manifest.json and RUN/config.json; empty when missing or damaged.
        store: the manifest of the store it was trained on; empty when that store is not there any more.
        records: the objects of RUN/log.jsonl, in order.
        evaluations: those of RUN/evaluation/, test first, with their predictions.
        problems: what was found damaged, in words.
    """

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[Evaluation, list[dict[str, Any]]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Read a run folder; `CheckpointError` if nothing in it belongs to a run."""
        run = cls(Path(path))
        if not run.path.is_dir():
            raise CheckpointError(f"{path}: run folder not found. Make one with: case-fast train --data STORE --out RUN")
        if not any((run.path / name).exists() for name in ("manifest.json", "config.json", "log.jsonl", "evaluation")):
            raise CheckpointError(f"{path}: not a run folder. Make one with: case-fast train --data STORE --out RUN")
        run.manifest, run.config = run._object(run.path / "manifest.json"), run._object(run.path / "config.json")
        store = run._object(Path(str(lookup(run.manifest, "store.path"))) / "manifest.json")
        if store.get("fingerprint") == lookup(run.manifest, "store.fingerprint"):
            run.store = store
        run.records = list(run._lines(run.path / "log.jsonl"))
        folders = [item for item in (run.path / "evaluation").glob("*") if item.is_dir()]
        order = {split: place for place, split in enumerate(_SPLITS)}
        for folder in sorted(folders, key=lambda item: (order.get(item.name, len(order)), item.name)):
            try:
                evaluation = Evaluation.load(folder)
            except CheckpointError as error:
                run.problems.append(str(error))
            else:
                run.evaluations.append((evaluation, list(run._lines(folder / "predictions.jsonl"))))
        return run

    def _object(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{path} cannot be read ({error})")
            return {}
        if not isinstance(found, dict):
            self.problems.append(f"{path} holds no JSON object")
            return {}
        return found

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        report = ReadReport(str(path))
        try:
            for number, line in read_lines(path, report) if path.exists() else ():
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    found = None
                if isinstance(found, dict):
                    yield found
                else:
                    report.skip("no JSON object", number)
        except (DataError, OSError) as error:
            self.problems.append(str(error))
        damaged = sum(report.skipped.values())
        if damaged:
            first = min(min(numbers) for numbers in report.lines.values())
            self.problems.append(f"{path}: {damaged:,} damaged line{'s' * (damaged > 1)} left out, the first is line {first}")

    def series(self, event: str, name: str, phase: int | None = None) -> Series:
        """(steps, values) of a number that the records of an event carry, at any depth; the last record of a step counts.

        What is not a finite number (a log writes "nan") is NaN, and makes a gap in a curve.
        """
        found: dict[int, float] = {}
        for record in self.records:
            step = record.get("step")
            if record.get("event") != event or not _is_number(step) or phase not in (None, record.get("phase")):
                continue
            value = _find(record, name)
            if value is not None:
                found[int(step)] = value
        return sorted(found), [found[step] for step in sorted(found)]

    def newest(self, *events: str) -> dict[str, Any]:
        """The last record of one of these events; {} if there is none."""
        return next((record for record in reversed(self.records) if record.get("event") in events), {})


def _find(record: dict[str, Any], name: str) -> float | None:
    if name in record:
        value = record[name]
        return float(value) if _is_number(value) else math.nan
    for value in record.values():
        if isinstance(value, dict) and (found := _find(value, name)) is not None:
            return found
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not


def lookup(values: Any, *names: str) -> Any:
    """The first of several dotted names ("store.path") that has a value, else None."""
    for name in names:
        found = values
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found not in (None, "", [], {}):
            return found
    return None
