"""Inferences from ATOMIC by retrieval: the nearest written events answer for an utterance.

Where no COMET weights are at hand this is the source of commonsense: TF-IDF vectors of events (scikit-learn), cosine
similarity, and the inferences that people wrote for the nearest ones (Sap et al. 2019; Hwang et al. 2021).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from case_fast.errors import ConfigError, DataError
from case_fast.knowledge.events import NORMALISATION, event_terms
from case_fast.knowledge.source import RELATIONS, check_request, clean_inferences, is_blank
from case_fast.text_files import ReadReport, read_lines, require_file

_CHUNK = 1024  # queries a sparse product: bounds its memory to some 50 MB at 24 k events
_SIMILARITY_STEPS = 10**6  # similarities are compared in whole steps, so that the last bits of a sum decide nothing
_KNOWN_RELATIONS = frozenset(RELATIONS) | frozenset(
    """
    xAttr xReason oEffect oReact oWant isAfter isBefore isFilledBy HinderedBy AtLocation CapableOf Causes CausesDesire
    CreatedBy DefinedAs DesireOf Desires HasA HasFirstSubevent HasLastSubevent HasPainCharacter HasPainIntensity
    HasPrerequisite HasProperty HasSubEvent HasSubevent InheritsFrom InstanceOf IsA LocatedNear LocationOfAction MadeOf
    MadeUpOf MotivatedByGoal NotCapableOf NotDesires NotHasA NotHasProperty NotIsA NotMadeOf ObjectUse PartOf
    ReceivesAction RelatedTo SymbolOf UsedFor
    """.split()
)
_HEADER_WORDS = frozenset("head head_event event relation tail tail_event target_event inference".split())
_EXPECTED = (f"rows 'event TAB relation TAB inference' with relations {', '.join(RELATIONS)}, or ATOMIC's CSV of an event a line "
             "with those relations as columns")
_WHOLE = ("v4_atomic_all_agg.csv", "v4_atomic_all.csv")  # of ATOMIC's release, either repeats all that its other files hold

# X tells it, so X as the subject goes ("PersonX gets wet" -> "gets wet", as most inferences are written).
_SUBJECT_X = re.compile(r"^(?:person\s?x|john|x)\s+(?!and\b|or\b)", re.IGNORECASE)
_PEOPLE = [
    (re.compile(rf"\b(?:person\s?{letter}|{name})(?P<own>\s?['’´]?s)?\b(?!-)", re.IGNORECASE), alone, own)
    for letter, name, alone, own in (
        ("x", "john|x(?![ -]?rays?)", "them", "their"),
        ("y", "tom|y(?!['’]all)", "someone", "someone's"),
        ("z", "z", "someone else", "someone else's"),
    )
]


def neutral_wording(inference: str) -> str:
    """ATOMIC's placeholders (PersonX, and the names John and Tom of some releases) in words a reply model knows.

    "PersonX" as the subject is dropped, elsewhere it becomes "them" / "their"; PersonY "someone", PersonZ "someone
    else". These are everyday words with embeddings, where "personx" would be a token that no dialogue holds.
    """
    text = _SUBJECT_X.sub("", inference.strip())
    for pattern, alone, own in _PEOPLE:
        text = pattern.sub(lambda found, alone=alone, own=own: own if found["own"] else alone, text)
    return text


class AtomicRetrieval:
    """A `KnowledgeSource` over files of ATOMIC-2020 (event TAB relation TAB inference) or ATOMIC (CSV, an event a line).

    ``path`` is a file or a folder: of that all ``*.tsv``, sorted by name; where there are none, ATOMIC's
    ``v4_atomic_all_agg.csv``, or else ``v4_atomic_all.csv``, or else all ``*.csv``; each also with ``.gz``.

    An event and a query are compared by the cosine of their TF-IDF vectors (sublinear tf) over `event_terms`. For each
    relation the events are walked from the nearest on, the inferences of one event from the most frequent on (ties: as
    in the file), until k distinct ones are found or ``neighbours`` events that have this relation were used. Events
    less similar than ``minimum_similarity`` are never used, so a text about nothing known has no inferences.

    Raises:
        DataError: a file is missing, damaged or holds no usable row.
        ConfigError: a setting is out of range.
    """

    def __init__(self, path: str | Path, neighbours: int = 10, minimum_similarity: float = 0.25):
        if neighbours < 1:
            raise ConfigError(f"neighbours: {neighbours} events; at least 1 is needed")
        if not 0 < minimum_similarity <= 1:
            raise ConfigError(f"minimum_similarity: {minimum_similarity} is not in (0, 1]")
        self.neighbours, self.minimum_similarity = neighbours, minimum_similarity
        self.settings: dict[str, Any] = {
            "neighbours": neighbours,
            "minimum_similarity": minimum_similarity,
            "normalisation": NORMALISATION,
        }
        files = _event_files(Path(path))
        digest = hashlib.sha256()
        self.reports: list[ReadReport] = []
        gathered: dict[tuple[str, ...], dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        for file in files:
            report = ReadReport(str(file))
            self.reports.append(report)
            for head, inferences in _read_rows(file, report, digest):
                if terms := event_terms(head):
                    for relation, tail in inferences:
                        gathered[tuple(terms)][relation][tail] += 1
                    report.rows += 1
                else:
                    report.ignored["event without content words"] += 1
        if not gathered:
            _raise_unusable(path, self.reports)
        self.identity = f"atomic:{digest.hexdigest()}"

        # Sorted, so that the order of equally near events does not depend on the order of the files.
        self.events = sorted(gathered)
        self._inferences = [
            {
                relation: cleaned
                for relation, tails in gathered[event].items()
                if (cleaned := clean_inferences((neutral_wording(tail) for tail, _ in tails.most_common()), len(tails)))
            }
            for event in self.events
        ]
        self._vectorizer = TfidfVectorizer(analyzer=list, sublinear_tf=True)  # documents come as lists of terms
        self._events_by_term = self._vectorizer.fit_transform(self.events).T.tocsr()

    @classmethod
    def bundled(cls, **settings: Any) -> AtomicRetrieval:
        """Retrieval over the small event file that comes with the package."""
        with resources.as_file(resources.files("case_fast") / "sample" / "atomic" / "events.tsv") as path:
            return cls(path, **settings)

    def infer(self, texts: Sequence[str], relations: Sequence[str], k: int) -> list[dict[str, list[str]]]:
        """See `KnowledgeSource`. Time is linear in texts; memory beyond the answers does not grow with them."""
        check_request(relations, k)
        answers: list[dict[str, list[str]]] = []
        for start in range(0, len(texts), _CHUNK):
            for nearest in self.nearest(texts[start : start + _CHUNK]):
                answers.append({relation: self._gather(nearest, relation, k) for relation in relations})
        return answers

    def nearest(self, texts: Sequence[str]) -> list[list[tuple[int, float]]]:
        """For each text (index in ``events``, similarity) of the events that may answer, nearest first, ties by index.

        Five times ``neighbours`` at most: not every event has every relation.
        """
        queries = self._vectorizer.transform([event_terms(text) for text in texts])
        product = (queries @ self._events_by_term).tocsr()
        reach, count = 5 * self.neighbours, len(self.events)
        lowest = round(self.minimum_similarity * _SIMILARITY_STEPS)
        found = []
        for row in range(product.shape[0]):
            entries = slice(product.indptr[row], product.indptr[row + 1])
            steps = np.rint(product.data[entries] * _SIMILARITY_STEPS).astype(np.int64)
            near = steps >= lowest
            # one integer an event, unique: the similarity first, then the smaller index
            rank = steps[near] * count + (count - 1 - product.indices[entries][near])
            if len(rank) > reach:
                rank = np.partition(rank, len(rank) - reach)[-reach:]
            step, index = np.divmod(np.sort(rank)[::-1], count)
            indices, similarities = (count - 1 - index).tolist(), (step / _SIMILARITY_STEPS).tolist()
            found.append(list(zip(indices, similarities, strict=True)))
        return found

    def _gather(self, nearest: list[tuple[int, float]], relation: str, k: int) -> list[str]:
        having = (self._inferences[event][relation] for event, _ in nearest if relation in self._inferences[event])
        return clean_inferences(chain.from_iterable(islice(having, self.neighbours)), k)


def _event_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [require_file(path, "ATOMIC file", f"Give a file with {_EXPECTED}, or a folder of such files")]
    found = {file.name.removesuffix(".gz"): file for file in sorted(path.iterdir()) if file.is_file()}
    whole = [found[name] for name in _WHOLE if name in found][:1]
    for files in ([found[name] for name in sorted(found) if name.endswith(".tsv")], whole,
                  [found[name] for name in sorted(found) if name.endswith(".csv")]):
        if files:
            return files
    raise DataError(path, "no *.tsv or *.csv file in this folder", f"Put files with {_EXPECTED} there")


def _read_rows(path: Path, report: ReadReport, digest: hashlib._Hash) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield (event, its (relation, inference)s) of each line that holds some of `RELATIONS`; ``digest`` sees every line."""
    columns: dict[str, int] | None = None  # of a file with an event a line
    delimiter = ","
    for number, line in read_lines(path, report):
        digest.update(line.encode() + b"\n")
        if not line.strip():
            report.ignored["blank line"] += 1
            continue
        if number == 1:
            delimiter = "\t" if "\t" in line else ","
            columns = _event_columns(_cells(line, delimiter))
            if columns:
                report.ignored["header"] += 1
                continue
        found = _event_row(line, delimiter, columns, number, report) if columns else _triple(line, number, report)
        if found is None:
            continue  # and is counted
        head, inferences = found
        inferences = [(relation, tail) for relation, tail in inferences if not is_blank(tail)]
        if is_blank(head):
            report.skip("event is blank", number)
        elif not inferences:
            report.ignored["no inference (blank or none)"] += 1
        else:
            yield head, inferences


def _triple(line: str, number: int, report: ReadReport) -> tuple[str, list[tuple[str, str]]] | None:
    """Event and inference of a row of three columns, or None where there is none of `RELATIONS`, which is counted."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != 3:
        report.skip("not 3 tab-separated columns", number)
        return None
    # ATOMIC's order is event, relation, inference; some releases order otherwise, and the relation tells
    column = next((i for i in (1, 0, 2) if fields[i] in _KNOWN_RELATIONS), None)
    if column is None:
        if number == 1 and not _HEADER_WORDS.isdisjoint(field.lower() for field in fields):
            report.ignored["header"] += 1
        else:
            report.skip("unknown relation", number)
        return None
    relation = fields.pop(column)
    if relation not in RELATIONS:
        report.ignored["other relation"] += 1
        return None
    return fields[0], [(relation, fields[1])]


def _event_columns(header: list[str]) -> dict[str, int] | None:
    """Where the event and each of `RELATIONS` stands in the lines of ATOMIC's CSV; None where this is no header of it."""
    names = {name.strip(): column for column, name in enumerate(header)}
    columns = {name: names[name] for name in ("event", *RELATIONS) if name in names}
    return columns if "event" in columns and len(columns) > 1 else None


def _event_row(line: str, delimiter: str, columns: dict[str, int], number: int,
               report: ReadReport) -> tuple[str, list[tuple[str, str]]] | None:
    """Event and inferences of a line of ATOMIC's CSV, whose cells are lists in JSON, or None where it is malformed."""
    cells = _cells(line, delimiter)
    if len(cells) <= max(columns.values()):
        report.skip("fewer columns than the header, or quotes that do not close", number)
        return None
    inferences = []
    for relation in RELATIONS:
        if relation in columns:
            try:
                tails = json.loads(cells[columns[relation]].strip() or "[]")
            except (ValueError, RecursionError):
                tails = None
            if not isinstance(tails, list) or not all(isinstance(tail, str) for tail in tails):
                report.skip(f"{relation} is no list of texts in JSON", number)
                return None
            inferences += [(relation, tail) for tail in tails]
    return cells[columns["event"]].strip(), inferences


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of a line of quoted CSV; none where it is no such line."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _raise_unusable(path: str | Path, reports: list[ReadReport]) -> NoReturn:
    whole = ReadReport(str(path))
    for report in reports:
        whole.skipped += report.skipped
        whole.ignored += report.ignored
    whole.require_rows(_EXPECTED)
    raise AssertionError("rows were read but none was kept")
