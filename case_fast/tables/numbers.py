"""What the runs of a table say together: means over seeds, and whether a row differs from CASE."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from case_fast.data import Store
from case_fast.errors import CheckpointError, ConfigError
from case_fast.evaluation import statistics as s
from case_fast.evaluation.floors import floors
from case_fast.evaluation.metrics import Metric
from case_fast.files import write_json
from case_fast.runs import Record, Run, lookup
from case_fast.tables.plan import Planned, Row

METRICS = {"ppl_geometric": "lower", "dist_1": "higher", "dist_2": "higher", "acc_1": "higher"}  # name -> which way is better
PAPER_NOTE = ("Published figures come from another vocabulary (built on all three splits), with GloVe vectors and, for CASE, "
              "KEMP and CEM, other knowledge: they stand beside ours to be looked at, not to be compared exactly.")


@dataclass
class Cell:
    """A metric of a row.

    Attributes:
        over: mean, sd and 95 % interval over seeds. values: of each seed.
        difference: to CASE, over the conversations of the test split; for perplexity of its logarithm. None: of CASE itself.
        adjusted: its p by Holm's method over the rows of the table. welch: p over seeds, None with fewer than two of either.
    """

    over: s.Interval
    values: list[float]
    difference: s.Difference | None = None
    adjusted: float | None = None
    welch: float | None = None


@dataclass
class Line:
    """A row of a table; ``cells``: a metric that the model has not is missing. ``by_emotion``: accuracy, mean over seeds.
    ``published``: figures of a paper, on real dialogues alone."""

    row: Row
    seeds: list[int]
    steps: list[int]
    seconds: list[float]
    folders: list[str]
    cells: dict[str, Cell] = field(default_factory=dict)
    by_emotion: dict[str, float] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    """``floors``: name of a floor -> its values by metric; ``left_out``: why a run is not here; ``signatures`` by metric."""

    number: int
    lines: list[Line]
    floors: dict[str, dict[str, float]]
    left_out: list[str]
    signatures: dict[str, str]
    store: dict[str, Any]
    draws: int

    @property
    def reference(self) -> Line | None:
        return next((line for line in self.lines if line.row.kind == "case" and not line.row.ablation), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"table": self.number} | {
            name: value for name, value in dataclasses.asdict(self).items() if name != "number"
        } | {"methods": {"interval": "Student's t over seeds, 95 %", "unit": "conversation", "draws": self.draws,
                         "means": "percentile bootstrap; sign-flip permutation", "dist": "approximate randomization",
                         "several": "Holm"}}


@dataclass
class _Told:
    """What a run's predictions tell, an entry an example (nan: nothing to measure)."""

    conversation: list[str]
    mean_nll: np.ndarray
    right: np.ndarray
    emotion: list[str | None]
    words: list[list[str]]


def table_of(number: int, planned: Sequence[Planned], simple: Mapping[str, Sequence[Metric]] | None = None, draws: int = s.DRAWS
             ) -> Table:
    """The table of the runs that are finished; the others are listed as left out.

    Args:
        simple: by name the metrics that simple models reach on the same split, see `floors_of`.

    Raises:
        ConfigError: the runs were not measured alike (store, split, vocabulary, decoding), or none is finished.
    """
    finished = [item for item in planned if item.state == "finished"]
    if not finished:
        raise ConfigError("no run of this table is finished: run the command without --dry_run, or see why they failed in the "
                          "log beside each run's folder")
    signatures = _same_measure(finished)
    left_out = [f"{item.row.name} ({item.row.recipe}), seed {item.seed}: {item.problem or item.about or 'not begun'}"
                for item in planned if item.state != "finished"]
    lines, told = [], {}
    for row in dict.fromkeys(item.row for item in finished):
        own = [item for item in finished if item.row == row]
        told[row] = [_predictions(item) for item in own]
        lines.append(_line(row, own, told[row]))
    table = Table(number, lines, {name: {metric.name: metric.value for metric in found if metric.value is not None}
                                  for name, found in (simple or {}).items()},
                  left_out, signatures, dict(finished[0].evaluation.about["store"]), draws)
    if table.reference is not None:
        _compare(table, told, draws)
    return table


def floors_of(store: Store, folder: Path) -> dict[str, list[Metric]]:
    """What a bigram model and a linear classifier reach on the test split (`case_fast.evaluation.floors`), by name; measured once
    a folder and store."""
    path = folder / "floors.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["store"]["fingerprint"] != store.fingerprint:
            raise ValueError("another store")
        perplexities, accuracies = ([Metric(**metric) for metric in found[name]] for name in ("perplexities", "accuracies"))
    except (OSError, ValueError, KeyError, TypeError):
        measured = floors(store, "test")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, measured.as_dict())
        perplexities, accuracies = measured.perplexities, measured.accuracies
    return {"bigram model": perplexities, "TF-IDF, logistic regression": accuracies}


def _same_measure(finished: Sequence[Planned]) -> dict[str, str]:
    """The one signature of each metric; `ConfigError` names two runs that differ."""
    found: dict[str, tuple[str, Planned]] = {}
    stores: dict[str, Planned] = {}
    for item in finished:
        evaluation = item.evaluation
        stores.setdefault(str(lookup(evaluation.about, "store.fingerprint")), item)
        for name in METRICS:
            metric = evaluation[name]
            if metric.value is None:
                continue
            signature, first = found.setdefault(name, (metric.signature, item))
            if signature != metric.signature:
                raise ConfigError(f"{first.folder} and {item.folder} were not measured alike: {signature} and "
                                  f"{metric.signature}. Evaluate them again with the same version and settings")
    if len(stores) > 1:
        one, other = list(stores.values())[:2]
        raise ConfigError(f"{one.folder} and {other.folder} were evaluated on different stores. Make a table of each store")
    return {name: signature for name, (signature, _) in found.items()}


def _predictions(item: Planned) -> _Told:
    path = Run(item.folder).evaluation("test") / "predictions.jsonl"
    record = Record(Run(item.folder))
    found = list(record.lines(path))
    if record.problems or len(found) != item.evaluation.examples:
        raise CheckpointError(f"{path}: {len(found)} of {item.evaluation.examples} examples can be read. Evaluate the run again")
    nll = [row["nll"] / row["tokens"] if row["nll"] is not None and row["tokens"] else math.nan for row in found]
    right = [math.nan if row["emotion"] is None or row["predicted"] is None else float(row["predicted"] == row["emotion"])
             for row in found]
    return _Told([str(row["id"]).split("#")[0] for row in found], np.array(nll), np.array(right),
                 [row["emotion"] for row in found], [row["words"] for row in found])


def _line(row: Row, items: Sequence[Planned], told: Sequence[_Told]) -> Line:
    manifests, evaluations = [Record.read(item.folder) for item in items], [item.evaluation for item in items]
    line = Line(row, [item.seed for item in items], [int(of.manifest["result"]["steps"]) for of in manifests],
                [_seconds(of) for of in manifests], [str(item.folder) for item in items], published=evaluations[0].paper)
    for name in METRICS:
        values = [evaluation[name].value for evaluation in evaluations]
        if all(value is not None for value in values):
            line.cells[name] = Cell(s.over_seeds(values), values)
    labels = sorted({label for label in told[0].emotion if label})
    for label in labels:
        chosen = np.array([emotion == label for emotion in told[0].emotion])
        share = [of.right[chosen].mean() for of in told]
        if not np.isnan(share).any():
            line.by_emotion[label] = float(np.mean(share))
    return line


def _seconds(record: Record) -> float:
    """How long its training took, in steps: a run that was stopped waited in between."""
    steps, speeds = record.series("step", "examples_per_second")
    batch = int(lookup(record.config, "batch_size") or 16)
    spans = np.diff([0, *steps])
    return round(float(sum(span * batch / speed for span, speed in zip(spans, speeds, strict=True) if speed > 0)), 1)


def _compare(table: Table, told: Mapping[Row, Sequence[_Told]], draws: int) -> None:
    """Each row against CASE."""
    reference = table.reference
    case = told[reference.row]
    names, conversation = np.unique(case[0].conversation, return_inverse=True)
    others = [line for line in table.lines if line is not reference]
    for line in others:
        own = told[line.row]
        if own[0].conversation != case[0].conversation:
            raise ConfigError(f"{line.folders[0]} and {reference.folders[0]} hold other examples, or in another order")
        for name, cell in line.cells.items():
            if name not in reference.cells:
                continue
            cell.welch = s.welch(cell.values, reference.cells[name].values)
            if name.startswith("dist"):
                seeds = min(len(own), len(case))
                cell.difference = s.distinct_difference([of.words for of in own[:seeds]], [of.words for of in case[:seeds]],
                                                        conversation, int(name[-1]), draws)
                continue
            part = "mean_nll" if name == "ppl_geometric" else "right"
            values = [np.stack([getattr(of, part) for of in runs]).mean(0) for runs in (own, case)]
            known = np.isfinite(values[0]) & np.isfinite(values[1])
            sums = [np.bincount(conversation[known], value[known], minlength=len(names)) for value in values]
            cell.difference = s.paired_means(*sums, np.bincount(conversation[known], minlength=len(names)), draws)
    for name in METRICS:
        found = {str(place): line.cells[name].difference.p for place, line in enumerate(others)
                 if name in line.cells and line.cells[name].difference is not None}
        for place, p in s.holm(found).items():
            others[int(place)].cells[name].adjusted = p
