"""Emotion intensity of words from an NRC-VAD lexicon (Mohammad 2018; v2: 2025), and the words of an NRC EmoLex file."""

from __future__ import annotations

import math
from pathlib import Path

from case_fast.errors import DataError
from case_fast.text_files import ReadReport, read_lines

_SIGNED_SHARE = 0.1  # v2's values lie in -1..1, so nearly every row has a negative one; in v1 (0..1) one is a mistake


class VADLexicon:
    """Word -> (valence, arousal), both in 0..1, and the word's emotion intensity.

    Source of the intensity: the distance of (valence, arousal / 2) from (0.5, 0), moved and scaled by fixed constants:
    (‖(v, a/2) - (0.5, 0)‖ - 0.06467) / 0.607468. A word not in the lexicon has 0.
    """

    def __init__(self, words: dict[str, tuple[float, float]], report: ReadReport | None = None):
        self.words, self.report = words, report

    @classmethod
    def read(cls, path: str | Path) -> VADLexicon:
        """Read the official text layout: columns parted by tabs, in the order that a header line gives them, without one
        word, valence, arousal, dominance.

        Values on -1..1 (v2) are brought to 0..1, which ``report.notes`` then says. Entries may hold spaces; case is
        ignored. Unreadable rows, values out of range and repeated words (the first wins) are counted in
        ``report.skipped``.

        Raises:
            DataError: the file is missing, its header lacks a column, or it holds no usable row.
        """
        report = ReadReport(str(path))
        columns = (0, 1, 2, 3)  # of word, valence, arousal and, where there is one, dominance
        rows: dict[str, tuple[int, list[float]]] = {}
        for number, line in read_lines(path, report):
            if not line.strip():
                report.ignored["blank line"] += 1
                continue
            fields = line.split("\t")
            if not rows and (named := _header(fields, str(path), number)):
                columns = named
                report.ignored["header"] += 1
            elif len(fields) <= max(columns):
                report.skip(f"fewer than {max(columns) + 1} tab-separated columns", number)
            elif not (word := " ".join(fields[columns[0]].lower().split())):
                report.skip("word is blank", number)
            elif (values := _numbers([fields[column] for column in columns[1:]])) is None:
                report.skip("value is not a number", number)
            elif max(map(abs, values)) > 1:
                report.skip("value out of range", number)
            elif word in rows:
                report.skip("repeated word (the first is kept)", number)
            else:
                rows[word] = (number, values)
        signed = {word for word, (_, values) in rows.items() if min(values) < 0}
        if len(signed) > _SIGNED_SHARE * len(rows):
            report.notes.append("values on -1..1, brought to 0..1")
            rows = {word: (number, [(value + 1) / 2 for value in values]) for word, (number, values) in rows.items()}
        else:
            for word in signed:
                report.skip("value out of range", rows.pop(word)[0])
        report.rows = len(rows)
        report.require_rows("rows 'word TAB valence TAB arousal TAB dominance' with values in 0..1 (or -1..1)")
        return cls({word: (values[0], values[1]) for word, (_, values) in rows.items()}, report)

    def intensity(self, word: str) -> float:
        """The emotion intensity of a lower-case word: about 0 (neutral) to 1; 0 for a word not in the lexicon."""
        if (values := self.words.get(word)) is None:
            return 0.0
        valence, arousal = values
        return (math.hypot(valence - 0.5, arousal / 2) - 0.06467) / 0.607468

    def intensities(self) -> dict[str, float]:
        """Of every word of the lexicon."""
        return {word: self.intensity(word) for word in self.words}

    def __contains__(self, word: str) -> bool:
        return word in self.words

    def __len__(self) -> int:
        return len(self.words)


def _header(fields: list[str], path: str, line: int) -> tuple[int, ...] | None:
    """The columns of word, valence, arousal and, where there is one, dominance that a header line names; None where the line
    is no header, such as the row of the word "valence", which holds numbers."""
    names = [field.strip(' "').lower() for field in fields]
    valence, arousal, dominance = (
        next((i for i, name in enumerate(names) if name in (whole, whole[:3], whole[0])), None)
        for whole in ("valence", "arousal", "dominance")
    )
    if [valence, arousal, dominance].count(None) > 1 or any(_numbers([field]) for field in fields):
        return None
    others = [i for i in range(len(names)) if i not in (valence, arousal, dominance)]
    word = next((i for i in others if "word" in names[i] or "term" in names[i]), next(iter(others), None))
    if valence is None or arousal is None or word is None:
        raise DataError(path, "the header does not name the columns of word, valence and arousal",
                        "Expected word, valence, arousal and dominance, in any order", line)
    return (word, valence, arousal) if dominance is None else (word, valence, arousal, dominance)


def read_emotion_words(path: str | Path) -> tuple[list[str], ReadReport]:
    """The words of a file in NRC EmoLex's text layout (Mohammad and Turney 2013): word TAB category TAB 0 or 1, a row for each
    word and category. Every word of the file counts, whatever its flags say, as in EmpDG's released code; each once, lower case.

    Raises:
        DataError: the file is missing or holds no usable row.
    """
    report = ReadReport(str(path))
    words: dict[str, None] = {}
    for number, line in read_lines(path, report):
        fields = line.split("\t")
        if not line.strip():
            report.ignored["blank line"] += 1
        elif len(fields) != 3:
            report.skip("not 3 tab-separated columns", number)
        elif fields[2].strip() not in ("0", "1"):
            report.skip("the flag is neither 0 nor 1", number)
        elif not (word := " ".join(fields[0].lower().split())):
            report.skip("word is blank", number)
        else:
            words[word] = None
            report.rows += 1
    report.require_rows("rows 'word TAB category TAB 0 or 1'")
    return list(words), report


def _numbers(fields: list[str]) -> list[float] | None:
    try:
        values = [float(field) for field in fields]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None
