"""Pretrained word vectors in GloVe's text format."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np

from case_fast.data.vocabulary import Vocabulary
from case_fast.errors import DataError
from case_fast.text_files import ReadReport, read_lines

_FIRST_ROWS = 100  # they decide the dimension: one row alone may be cut short, or its word may hold blanks


def read_glove(path: str | Path, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, ReadReport]:
    """Vectors of the vocabulary's words from a GloVe text file (``word v_1 ... v_d`` a line; ``.gz`` is read as well).

    The dimension d is that of most of the first rows; a word2vec header line (``count d``) must agree. The last d fields of
    a row are its vector, so that a word may hold blanks (GloVe 840B has some). The first vector of a word wins; malformed
    rows are counted in the report. The numbers of words that are not in the vocabulary are not looked at.

    Returns:
        ids (n,) int32 ascending, vectors (n, d) float32, report (coverage is n / len(vocabulary)).

    Raises:
        DataError: the file is missing or damaged, its header is wrong, or it has no vector for a word of the vocabulary.
    """
    report = ReadReport(str(path))
    lines = ((number, line.rstrip()) for number, line in read_lines(path, report))
    first = list(islice(lines, _FIRST_ROWS))
    header = _header(*first[0]) if first else None
    if header is not None:
        report.ignored["header"] += 1
        del first[0]
    sizes = Counter(blanks for _, line in first if (blanks := line.count(" ")))
    d = sizes.most_common(1)[0][0] if sizes else 1
    if header not in (None, d) and sizes:
        raise DataError(path, f"the header says {header} numbers a word, the rows hold {d}", "Download it again", 1)
    found: dict[int, np.ndarray] = {}
    for number, line in chain(first, lines):
        fields = line.split(" ")
        if len(fields) <= d:
            report.skip("too few numbers", number)
            continue
        index = vocabulary.ids.get(" ".join(fields[:-d]))
        if index is None:
            report.ignored["not in the vocabulary"] += 1
            continue
        try:
            with np.errstate(over="ignore"):
                vector = np.array(fields[-d:], dtype=np.float32)
        except ValueError:
            report.skip("not a number", number)
            continue
        if not np.isfinite(vector).all():
            report.skip("NaN or infinite value", number)
        elif index in found:
            report.skip("word occurs twice", number)
        else:
            found[index] = vector
            report.rows += 1
    report.require_rows("a word of the vocabulary and its numbers, separated by blanks")
    ids = np.array(sorted(found), dtype=np.int32)
    return ids, np.stack([found[int(i)] for i in ids]), report


def _header(number: int, line: str) -> int | None:
    """The dimension that a word2vec header line names."""
    fields = line.split(" ")
    plain = number == 1 and len(fields) == 2 and all(f.isascii() and f.isdigit() and len(f) < 12 for f in fields)
    return int(fields[1]) if plain else None
