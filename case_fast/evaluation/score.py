"""`case-fast score`: replies of several systems measured alike, with intervals, and with what sets each apart from the first.

The unit of everything drawn is the conversation (the replies whose contexts begin with the same turn), as in tables. Differences
are taken on the replies that both systems gave to the same contexts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from case_fast.errors import CheckpointError
from case_fast.evaluation import measures as x
from case_fast.evaluation import statistics as s
from case_fast.evaluation.evaluate import Evaluation
from case_fast.evaluation.measures import Measure, Parts, Sums
from case_fast.evaluation.metrics import TITLES, Metric
from case_fast.evaluation.replies import Reply, ReplyFile, matched
from case_fast.runs import lookup

LEAST = 20  # conversations of which an interval can be drawn
EXCHANGES = 2_000  # of Dist-n; of the others `statistics.DRAWS`


class Measurer(Protocol):
    """What takes further measures: `Epitome`, `Intents`, `BertScore`."""

    def measures(self, replies: Sequence[Reply]) -> list[Measure]: ...


@dataclass
class Cell:
    """A metric of a system.

    Attributes:
        low, high: 95 % interval; None where there is none.
        difference: to the first system, on ``pairs`` replies to the same contexts. None: of the first, of metrics without value,
            and of those with another signature.
        adjusted: its p by Holm's method over the systems.
    """

    metric: Metric
    low: float | None = None
    high: float | None = None
    difference: s.Difference | None = None
    pairs: int = 0
    adjusted: float | None = None


@dataclass
class Scores:
    """What `score` found.

    Attributes:
        systems: of each name, path, sha256, form, replies, conversations, what was skipped, and replies matched with the first.
        cells: by metric, in the order of tables, a cell of each system.
        groups: of each metric its group, one of `measures.GROUPS`.
    """

    systems: list[dict[str, Any]]
    cells: dict[str, list[Cell]]
    groups: dict[str, str]
    draws: int = s.DRAWS
    methods: dict[str, str] = field(default_factory=lambda: {
        "unit": "conversation: replies whose contexts begin with the same turn",
        "interval": f"95 %; what sums over replies decide: percentile bootstrap; else spread of {s.HALVES} random halves",
        "p": "two-sided, exchange of both systems' replies in random conversations; of gzip_ratio, self_repetition and "
             "common_replies from the spread of their difference", "several": "Holm, over the systems",
    })

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = [system["name"] for system in self.systems]
        return {"systems": self.systems, "draws": self.draws, "methods": self.methods, "metrics": {
            name: {"title": cells[0].metric.title, "group": self.groups[name],
                   "systems": {system: dataclasses.asdict(cell) for system, cell in zip(names, cells, strict=True)}}
            for name, cells in self.cells.items()}}


def score(files: Sequence[ReplyFile], measurers: Sequence[Measurer] = (), draws: int = s.DRAWS,
          told: Callable[[str], None] = lambda what: None) -> Scores:
    """Measure the replies of each file; ``told`` is told what is being done.

    A file without references takes those of the same contexts from the others.
    """
    files = [_ordered(file) for file in files]
    references = {reply.key: (reply.reference, reply.reference_words)
                  for file in reversed(files) for reply in file.replies if reply.reference_words}
    files = [dataclasses.replace(file, replies=[_with_reference(reply, references) for reply in file.replies]) for file in files]
    vocabularies = [_vocabulary(file) for file in files]
    measured = []
    for file, words in zip(files, vocabularies, strict=True):
        told(file.name)
        measured.append(_Measured.of(file.replies, words, measurers, draws))
    scores = Scores([], {}, {}, draws)
    for place, (file, own) in enumerate(zip(files, measured, strict=True)):
        pairs = matched(files[0], file) if place else []
        cells = {name: Cell(measure.metric, *own.interval(name)) for name, measure in own.measures.items()}
        if pairs:
            told(f"{file.name} against {files[0].name}")
            _compare(cells, pairs, (measured[0], own), (vocabularies[0], vocabularies[place]), measurers, draws)
        scores.systems.append({
            "name": file.name, "path": str(file.path), "sha256": file.sha256, "form": file.form, "replies": len(file.replies),
            "conversations": own.count, "skipped": dict(file.report.skipped), "matched": len(pairs) if place else None})
        for name, measure in own.measures.items():
            scores.groups[name] = measure.group
            scores.cells.setdefault(name, [Cell(_not_measured(measure.metric))] * place).append(cells[name])
        for found in scores.cells.values():
            if len(found) == place:
                found.append(Cell(_not_measured(found[0].metric)))
    _arrange(scores)
    _adjust(scores)
    return scores


def _not_measured(metric: Metric) -> Metric:
    return Metric(metric.name, None, "", metric.better, 0, "the file does not tell")


def _ordered(file: ReplyFile) -> ReplyFile:
    """By context: nothing depends on the order of the lines."""
    return dataclasses.replace(file, replies=sorted(file.replies, key=lambda of: (of.key, of.reference_words, of.words)))


def _with_reference(reply: Reply, references: dict[tuple[str, ...], tuple[str, tuple[str, ...]]]) -> Reply:
    if reply.reference_words or reply.key not in references:
        return reply
    text, words = references[reply.key]
    return dataclasses.replace(reply, reference=text, reference_words=words)


def _vocabulary(file: ReplyFile) -> int | None:
    """Words of the vocabulary that an evaluation of ours was taken over: part of the signature of a perplexity."""
    try:
        found = lookup(Evaluation.load(file.path.parent).about, "store.vocabulary") if file.form == "predictions" else None
    except CheckpointError:
        return None
    return found if isinstance(found, int) else None


# ---- one set of replies


@dataclass
class _Measured:
    """Measures by name, and what their draws give: conversations (n,) of the replies, how many there are, values (draws,)."""

    measures: dict[str, Measure]
    conversation: np.ndarray
    count: int
    drawn: dict[str, np.ndarray]

    @classmethod
    def of(cls, replies: Sequence[Reply], vocabulary: int | None, measurers: Sequence[Measurer], draws: int) -> _Measured:
        found = [*x.predicted(replies, vocabulary), *x.of_replies(replies), *x.overlap(replies)]
        for measurer in measurers:
            found += measurer.measures(replies)
        _, conversation = np.unique(np.array([reply.key[0] for reply in replies], dtype=object), return_inverse=True)
        own = cls({measure.metric.name: measure for measure in found}, conversation, int(conversation.max()) + 1, {})
        if own.count >= LEAST:
            own._draw(draws)
        return own

    def sums(self, names: Sequence[str]) -> np.ndarray:
        """(C, K) of each conversation, the rows of all these measures side by side."""
        n = len(self.conversation)
        belongs = sparse.csr_array((np.ones(n), (self.conversation, np.arange(n))), shape=(self.count, n))
        return np.concatenate([np.zeros((self.count, 0)), *(belongs @ self.measures[name].spread.rows for name in names)], axis=1)

    def named(self, kind: type) -> list[str]:
        return [name for name, measure in self.measures.items() if isinstance(measure.spread, kind)]

    def values(self, sums: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """(draws, K) as `sums` puts them -> (draws,) of each measure."""
        found, start = {}, 0
        for name in names:
            spread = self.measures[name].spread
            found[name] = spread.value(sums[:, start : start + spread.rows.shape[1]])
            start += spread.rows.shape[1]
        return found

    def _draw(self, draws: int) -> None:
        names = self.named(Sums)
        self.drawn = self.values(s.resampled(self.sums(names), draws), names)
        names = self.named(Parts)
        halves = [[self.measures[name].spread.value(half[self.conversation]) for name in names] for half in s.halves(self.count)]
        for name, values in zip(names, np.array(halves).T, strict=True):
            self.drawn[name] = s.scaled(values, self.measures[name].metric.value)

    def interval(self, name: str) -> tuple[float, float] | tuple[None, None]:
        return self.span(name, self.drawn.get(name), self.measures[name].metric.value)

    def span(self, name: str, drawn: np.ndarray | None, whole: float | None) -> tuple[float, float] | tuple[None, None]:
        """The interval of draws of a metric, or of a difference of it."""
        if drawn is None or not np.isfinite(drawn).all():
            return None, None
        return s.percentiles(drawn) if isinstance(self.measures[name].spread, Sums) else s.about(whole, drawn)


# ---- two


def _compare(cells: dict[str, Cell], pairs: Sequence[tuple[Reply, Reply]], measured: tuple[_Measured, _Measured],
             vocabularies: tuple[int | None, int | None], measurers: Sequence[Measurer], draws: int) -> None:
    """Put the differences to the first system into the cells of another one."""
    first, own = measured
    same = all(one.reference_words == other.reference_words for one, other in pairs)
    if not (same and len(pairs) == len(first.conversation) == len(own.conversation)):  # measured on just these replies
        sides = [one for one, _ in pairs], [dataclasses.replace(
            other, reference=one.reference, reference_words=one.reference_words) for one, other in pairs]
        first, own = (_Measured.of(side, words, measurers, draws) for side, words in zip(sides, vocabularies, strict=True))
    alike = {name for name, measure in own.measures.items() if name in first.measures and measure.spread is not None
             and first.measures[name].spread is not None and measure.metric.signature == first.measures[name].metric.signature}
    p = _exchanges(first, own, sorted(alike), draws) if own.count >= LEAST else {}
    for name in alike:
        whole = own.measures[name].metric.value - first.measures[name].metric.value
        drawn = own.drawn[name] - first.drawn[name] if name in own.drawn else None
        cells[name].difference = s.Difference(whole, p.get(name), *own.span(name, drawn, whole))
        cells[name].pairs = len(pairs)


def _exchanges(first: _Measured, own: _Measured, names: Sequence[str], draws: int) -> dict[str, float]:
    """p of each metric that both have."""
    sums = [name for name in names if isinstance(own.measures[name].spread, Sums)]
    one, other = (own.values(values, sums) for values in s.exchanged(own.sums(sums), first.sums(sums), draws))
    found = {}
    for name in names:
        whole, spread = own.measures[name].metric.value - first.measures[name].metric.value, own.measures[name].spread
        if isinstance(spread, Sums):
            differences = one[name] - other[name]
            if np.isfinite(differences).all():
                found[name] = s.share_as_large(differences, whole)
        elif spread.things is not None:
            sides = [spread.things], [first.measures[name].spread.things]
            found[name] = s.distinct_difference(*sides, own.conversation, 1, min(draws, EXCHANGES)).p
        else:
            found[name] = s.as_far(whole, own.drawn[name] - first.drawn[name])
    return found


# ---- all


def _arrange(scores: Scores) -> None:
    """Metrics in the order of tables: by group, in each as `TITLES` has them; the paper's four first, overlap last."""
    groups, titles = [*x.GROUPS], [*TITLES]
    names = sorted(scores.cells, key=lambda name: (groups.index(scores.groups[name]), titles.index(name)))
    scores.cells = {name: scores.cells[name] for name in names}


def _adjust(scores: Scores) -> None:
    for cells in scores.cells.values():
        p = {place: cell.difference.p for place, cell in enumerate(cells)
             if cell.difference and cell.difference.p is not None}
        for place, adjusted in s.holm(p).items():
            cells[place].adjusted = adjusted


def with_rows(scores: Scores, rows: Sequence[Measure]) -> Scores:
    """The scores with rows of no value, the same for each system."""
    for row in rows:
        scores.cells[row.metric.name] = [Cell(row.metric)] * len(scores.systems)
        scores.groups[row.metric.name] = row.group
    _arrange(scores)
    return scores
