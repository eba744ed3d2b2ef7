"""Concept neighbours of words from ConceptNet's assertions (Speer et al. 2017), read as a stream."""

from __future__ import annotations

import json
import math
from bisect import insort
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

from case_fast.errors import ConfigError, DataError
from case_fast.text_files import ReadReport, read_lines, require_file

EXCLUDED_RELATIONS = frozenset(
    """
    Antonym ExternalURL NotDesires NotHasProperty NotCapableOf dbpedia DistinctFrom EtymologicallyDerivedFrom
    EtymologicallyRelatedTo SymbolOf FormOf AtLocation DerivedFrom CreatedBy Synonym MadeOf
    """.split()
)
_LINES_PER_CALL = 1 << 17


def read_concepts(
    path: str | Path,
    vocabulary: Container[str],
    intensity: Callable[[str], float] | Mapping[str, float],
    stop_words: Container[str],
    per_token: int = 3,
    minimum_intensity: float = 0.6,
    minimum_weight: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, list[str]], ReadReport]:
    """The best neighbours of English words: head -> up to ``per_token`` words by (-intensity, word).

    ``path`` is an assertions file, gzip or not: URI, /r/relation, /c/en/start, /c/en/end, JSON with a
    "weight", tab-separated; the URI is not looked at. An assertion counts in both directions. A neighbour is in
    ``vocabulary``, no stop word, and of at least ``minimum_intensity``; a head is no stop word; both are single words.
    ``progress(done, total)`` is told bytes of the file.

    One pass whose memory is bounded by the answer. Rows that cannot matter (another language, an unwanted relation or
    word) are counted in ``report.ignored`` before their JSON would be parsed; malformed rows are counted in
    ``report.skipped``. ``report.rows``: the assertions that gave a neighbour, known or new.

    Raises:
        DataError: the file is missing, damaged, or has no row of this layout.
    """
    if per_token < 1:
        raise ConfigError(f"per_token: {per_token} concepts a word; at least 1 is needed")
    measure = intensity if callable(intensity) else lambda word: intensity.get(word, 0.0)
    report = ReadReport(str(path))
    best: dict[str, list[tuple[float, str]]] = {}
    ranks: dict[str, tuple[float, str] | None] = {}  # only of words in the vocabulary, so that memory stays bounded

    def rank(word: str) -> tuple[float, str] | None:
        """The sort key of a word that may be a neighbour, else None."""
        if word not in vocabulary:
            return None
        if word not in ranks:
            strength = 0.0 if word in stop_words else measure(word)
            ranks[word] = (-strength, word) if word not in stop_words and strength >= minimum_intensity else None
        return ranks[word]

    def offer(head: str, neighbour: tuple[float, str]) -> None:
        kept = best.setdefault(head, [])
        if neighbour not in kept:
            insort(kept, neighbour)
            del kept[per_token:]

    ignored = report.ignored
    for number, line in _lines(path, report, progress):
        if line.count("\t/c/en/") != 2:  # nine tenths of the full file end here
            if line.count("\t") == 4 and "\t/r/" in line:
                ignored["not English on both ends"] += 1
            elif line.strip():
                report.skip("not 5 tab-separated columns with /r/ and /c/", number)
            else:
                ignored["blank line"] += 1
            continue
        fields = line.split("\t")
        if len(fields) != 5 or not fields[1].startswith("/r/") or not fields[2].startswith("/c/en/"):
            report.skip("not 5 tab-separated columns with /r/ and /c/", number)
            continue
        _, relation, start, end, data = fields
        left, right = start[6:].split("/", 1)[0], end[6:].split("/", 1)[0]
        if not left or not right:
            report.skip("concept is blank", number)
        elif relation[3:].split("/", 1)[0] in EXCLUDED_RELATIONS:
            ignored["excluded relation"] += 1
        elif left == right:
            ignored["both ends equal"] += 1
        elif "_" in left or "_" in right:
            ignored["several words"] += 1
        else:
            leftward = rank(left) if right not in stop_words else None
            rightward = rank(right) if left not in stop_words else None
            if leftward is None and rightward is None:
                ignored["no end is a usable concept"] += 1
            elif (weight := _weight(data)) is None:
                report.skip("last column is not JSON with a number as weight", number)
            elif weight < minimum_weight:
                ignored[f"weight below {minimum_weight:g}"] += 1
            else:
                report.rows += 1
                if rightward:
                    offer(left, rightward)
                if leftward:
                    offer(right, leftward)
    if not ignored.total():
        report.require_rows("ConceptNet 5.7 assertions 'URI TAB /r/X TAB /c/en/a TAB /c/en/b TAB {\"weight\": 1.0}'")
    return {head: [word for _, word in kept] for head, kept in best.items()}, report


def _weight(data: str) -> float | None:
    try:
        weight = json.loads(data)["weight"]
        sound = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return weight if sound else None


def _lines(path: str | Path, report: ReadReport, progress: Callable[[int, int], None] | None) -> Iterator[tuple[int, str]]:
    """`read_lines`, which tells ``progress`` how many of the file's bytes were read."""
    path = require_file(path, "ConceptNet assertions file")
    total = path.stat().st_size
    try:
        raw = open(path, "rb")
    except OSError as error:
        raise DataError(path, f"cannot be opened ({error.strerror or error})", "Check its permissions") from error
    with raw:
        lines = read_lines(path, report, raw)
        for count, numbered in enumerate(lines):
            if progress and count % _LINES_PER_CALL == 0:
                progress(raw.tell(), total)
            yield numbered
    if progress:
        progress(total, total)
