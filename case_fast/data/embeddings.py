"""Pretrained word vectors in GloVe's text format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from case_fast.data.vocabulary import Vocabulary
from case_fast.errors import DataError
from case_fast.reading import ReadReport, read_lines


def read_glove(path: str | Path, vocabulary: Vocabulary, dimension: int | None = None
               ) -> tuple[np.ndarray, np.ndarray, ReadReport]:  # fmt: skip
    """Vectors of the vocabulary's words from a GloVe text file (``word v_1 ... v_d`` a line; ``.gz`` is read as well).

    A word2vec header line (``count dimension``) is recognised. A word may hold blanks (GloVe 840B has some): the last d
    fields are the vector. The first vector of a word wins; malformed rows are counted in the report.

    Returns:
        ids (n,) int32 ascending, vectors (n, d) float32, report (coverage is n / len(vocabulary)).

    Raises:
        DataError: the file is missing, holds no usable row, or its dimension is not ``dimension``.
    """
    report = ReadReport(str(path))
    found: dict[int, np.ndarray] = {}
    d: int | None = dimension
    for number, line in read_lines(path, report):
        fields = line.rstrip().split(" ")
        if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
            d = d or int(fields[1])
            if d != int(fields[1]):
                raise DataError(path, f"vectors of dimension {fields[1]}, expected {d}", "Give a matching file", number)
            continue
        if d is None:
            d = len(fields) - 1
        if len(fields) < d + 1 or d < 1:
            if report.rows == 0 and number == 1:
                raise DataError(path, f"a row of {len(fields)} fields, expected a word and {d} numbers",
                                "Give a GloVe text file of the model's dimension", number)  # fmt: skip
            report.skip("too few numbers", number)
            continue
        word = " ".join(fields[:-d])
        if " " in word and report.rows == 0 and dimension is not None:
            raise DataError(path, f"vectors of dimension {len(fields) - 1}, expected {dimension}",
                            "Give a file of the model's dimension, or set the dimension", number)  # fmt: skip
        index = vocabulary.ids.get(word)
        if index is None:
            report.rows += 1
            continue
        try:
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
    report.require_rows("a word and its numbers, separated by blanks")
    ids = np.array(sorted(found), dtype=np.int32)
    vectors = np.stack([found[int(i)] for i in ids]) if len(ids) else np.zeros((0, d or 0), dtype=np.float32)
    return ids, vectors, report
