"""Emotion intensity of words from an NRC-VAD lexicon (Mohammad 2018; v2: 2025), and the words of an NRC EmoLex file."""

from __future__ import annotations

import math
from pathlib import Path

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
        """Read the official text layout: Word TAB Valence TAB Arousal TAB Dominance, with or without a header line.

        Values on -1..1 (v2) are brought to 0..1, which ``report.notes`` then says. Entries may hold spaces; case is
        ignored. Unreadable rows, values out of range and repeated words (the first wins) are counted in
        ``report.skipped``.

        Raises:
            DataError: the file is missing or holds no usable row.
        """
        report = ReadReport(str(path))
        rows: dict[str, tuple[int, float, float, float]] = {}
        for number, line in read_lines(path, report):
            if not line.strip():
                report.ignored["blank line"] += 1
                continue
            fields = line.split("\t")
            if number == 1 and "valence" in line.lower():
                report.ignored["header"] += 1
            elif len(fields) < 4:
                report.skip("fewer than 4 tab-separated columns", number)
            elif not (word := " ".join(fields[0].lower().split())):
                report.skip("word is blank", number)
            elif (values := _numbers(fields[1:4])) is None:
                report.skip("value is not a number", number)
            elif max(map(abs, values)) > 1:
                report.skip("value out of range", number)
            elif word in rows:
                report.skip("repeated word (the first is kept)", number)
            else:
                rows[word] = (number, *values)
        signed = {word for word, (_, *values) in rows.items() if min(values) < 0}
        if len(signed) > _SIGNED_SHARE * len(rows):
            report.notes.append("values on -1..1, brought to 0..1")
            rows = {word: (number, *((value + 1) / 2 for value in values)) for word, (number, *values) in rows.items()}
        else:
            for word in signed:
                report.skip("value out of range", rows.pop(word)[0])
        report.rows = len(rows)
        report.require_rows("rows 'word TAB valence TAB arousal TAB dominance' with values in 0..1 (or -1..1)")
        return cls({word: (valence, arousal) for word, (_, valence, arousal, _) in rows.items()}, report)

    def intensity(self, word: str) -> float:
        """The emotion intensity of a lower-case word: about 0 (neutral) to 1; 0 for a word not in the lexicon."""
        if (values := self.words.get(word)) is None:
            return 0.0
        valence, arousal = values
        return (math.hypot(valence - 0.5, arousal / 2) - 0.06467) / 0.607468

    def __contains__(self, word: str) -> bool:
        return word in self.words

    def __len__(self) -> int:
        return len(self.words)


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
