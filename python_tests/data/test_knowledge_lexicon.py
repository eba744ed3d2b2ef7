"""The NRC-VAD reader and the emotion intensity."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from case_fast.errors import DataError
from case_fast.knowledge import VADLexicon, read_emotion_words

REAL = Path(os.environ.get("CASE_FAST_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HEADER = "Word\tValence\tArousal\tDominance\n"
GOOD = "calm\t0.8\t0.1\t0.5\n"


def read(tmp_path: Path, content: str | bytes) -> VADLexicon:
    path = tmp_path / "lexicon.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return VADLexicon.read(path)


def test_intensity_is_that_by_hand(tmp_path):
    lexicon = read(tmp_path, HEADER + "grief\t0.1\t0.6\t0.2\n" + "table\t0.5\t0.0\t0.5\n" + "joy\t1.0\t1.0\t0.9\n"
                   + "wow\t0.8\t0.8\t0.5\n")
    # grief: (0.1, 0.3) - (0.5, 0) is a 3-4-5 triangle of length 0.5
    assert lexicon.intensity("grief") == pytest.approx((0.5 - 0.06467) / 0.607468, abs=1e-12)
    assert lexicon.intensity("wow") == pytest.approx((0.5 - 0.06467) / 0.607468, abs=1e-12)  # the same on the pleasant side
    assert lexicon.intensity("table") == pytest.approx(-0.06467 / 0.607468, abs=1e-12)
    assert lexicon.intensity("joy") == pytest.approx((math.sqrt(0.5) - 0.06467) / 0.607468, abs=1e-12)
    assert lexicon.intensity("unheard of") == 0.0 and isinstance(lexicon.intensity("unheard of"), float)
    assert len(lexicon) == 4 and "joy" in lexicon and "Joy" not in lexicon
    assert lexicon.words["grief"] == (0.1, 0.6)


def test_a_header_a_mark_or_more_columns_change_no_entry(tmp_path):
    rows = GOOD + "Alarm  Clock\t0.3\t0.7\t0.5\r\n\n" + "more columns\t0.3\t0.7\t0.5\tnote\n"
    for content in (rows, HEADER + rows, "\ufeff" + HEADER + rows, "term\tvalence\tarousal\tdominance\n" + rows):
        lexicon = read(tmp_path, content)
        assert set(lexicon.words) == {"calm", "alarm clock", "more columns"}
        assert lexicon.report.rows == 3 and not lexicon.report.skipped and not lexicon.report.notes
        assert lexicon.report.ignored["blank line"] == 1


def test_values_on_minus_one_to_one_are_rescaled(tmp_path):
    lexicon = read(tmp_path, HEADER + "grief\t-0.8\t0.2\t-0.6\n" + "joy\t1.0\t1.0\t0.8\n" + "table\t0\t-1\t0\n")
    assert lexicon.words == {"grief": pytest.approx((0.1, 0.6)), "joy": (1.0, 1.0), "table": (0.5, 0.0)}
    assert lexicon.intensity("grief") == pytest.approx((0.5 - 0.06467) / 0.607468)
    assert lexicon.report.notes == ["values on -1..1, brought to 0..1"] and "-1..1" in lexicon.report.summary()


ENTRIES = {"calm": (0.8, 0.1, 0.5), "alarm clock": (0.3, 0.7, 0.4), "valence": (0.6, 0.3, 0.2)}
SIGNED = {"calm": (0.8, -0.6, 0.5), "alarm clock": (-0.3, 0.7, -0.4), "valence": (0.6, -0.3, 0.2)}
ORDERS = [
    "Word Valence Arousal Dominance", "term valence arousal dominance", "Word Arousal Valence Dominance",
    "Valence Arousal Dominance Word", "Word Dominance Arousal Valence", "number TERM DOMINANCE AROUSAL VALENCE",
    "Arousal Word Valence", "Word V A D", "Words Val Aro Dom", "A D V term", '"Word" "Dominance" "Valence" "Arousal"', "",
]


def table(entries: dict[str, tuple[float, float, float]], header: str) -> str:
    """The entries in the columns of the header; without one in the official order."""
    lines = [header.replace(" ", "\t")] if header else []
    for word, (valence, arousal, dominance) in entries.items():
        cells = {"v": valence, "a": arousal, "d": dominance, "w": word, "t": word, "n": 7}
        lines.append("\t".join(str(cells[name.strip('"')[0].lower()]) for name in (header or ORDERS[0]).split()))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("header", ORDERS)
@pytest.mark.parametrize("before", ["", "\n", "\ufeff"])
def test_the_header_gives_the_order_of_the_columns(tmp_path, header, before):
    lexicon = read(tmp_path, before + table(ENTRIES, header))
    assert lexicon.words == {word: values[:2] for word, values in ENTRIES.items()}
    assert lexicon.report.ignored["header"] == bool(header) and not lexicon.report.skipped


@pytest.mark.parametrize("header", ORDERS)
def test_version_2_is_read_in_any_order_too(tmp_path, header):
    lexicon = read(tmp_path, table(SIGNED, header))
    assert lexicon.words == {word: ((v + 1) / 2, (a + 1) / 2) for word, (v, a, _) in SIGNED.items()}
    assert lexicon.report.notes == ["values on -1..1, brought to 0..1"]


@pytest.mark.parametrize("first", ["valence\t0.6\t0.3\t0.2", "v\t0.6\t0.3\t0.2", "arousal\t0.6\t0.3\t0.2", "a\t0.5\t0.5\t0.5",
                                   "dominance\t0.6\t0.3\t0.2\tvalence", "valence arousal\t0.1\t0.2\t0.3"])
def test_a_word_that_a_header_would_name_is_an_entry(tmp_path, first):
    lexicon = read(tmp_path, first + "\n" + GOOD)
    assert first.split("\t")[0] in lexicon and lexicon.report.rows == 2 and not lexicon.report.ignored


@pytest.mark.parametrize(
    "header", ["Word\tValence\tDominance", "Arousal\tDominance\tWord", "Valence\tArousal", "V\tA\tD", "term\tv\td\tx"]
)
def test_a_header_without_a_column_is_an_error(tmp_path, header):
    with pytest.raises(DataError, match=r"lexicon\.txt:1: the header does not name the columns of word, valence and arousal"):
        read(tmp_path, header + "\n" + GOOD)


def test_one_negative_value_does_not_move_the_scale(tmp_path):
    rows = "".join(f"word{chr(97 + i)}\t0.5\t0.5\t0.5\n" for i in range(20))
    lexicon = read(tmp_path, HEADER + rows + "typo\t-0.5\t0.5\t0.5\n")
    assert "typo" not in lexicon and lexicon.words["worda"] == (0.5, 0.5) and not lexicon.report.notes
    assert lexicon.report.skipped == {"value out of range": 1} and lexicon.report.lines == {"value out of range": [22]}


@pytest.mark.parametrize(
    "content, reason, line",
    [
        (GOOD + "short\t0.1\t0.2\n", "fewer than 4 tab-separated columns", 2),
        (GOOD + "commas,0.1,0.2,0.3\n", "fewer than 4 tab-separated columns", 2),
        (GOOD + "spaces 0.1 0.2 0.3\n", "fewer than 4 tab-separated columns", 2),
        (GOOD + " \t0.1\t0.2\t0.3\n", "word is blank", 2),
        (GOOD + "words\thigh\tlow\tlow\n", "value is not a number", 2),
        (GOOD + "empty\t\t0.2\t0.3\n", "value is not a number", 2),
        (GOOD + "nan\tnan\t0.2\t0.3\n", "value is not a number", 2),
        (GOOD + "infinite\t0.1\tinf\t0.3\n", "value is not a number", 2),
        (GOOD + "huge\t0.1\t0.2\t1e999\n", "value is not a number", 2),
        (GOOD + "percent\t10\t20\t30\n", "value out of range", 2),
        (GOOD + "low\t0.1\t-1.01\t0.3\n", "value out of range", 2),
        (GOOD + "Calm\t0.1\t0.2\t0.3\n", "repeated word (the first is kept)", 2),
        (GOOD + HEADER, "value is not a number", 2),  # a header belongs to line 1
        (GOOD.encode() + b"caf\xe9\t0.1\t0.2\t0.3\n", "not UTF-8", 2),
        (GOOD.encode() + b"nul\0\t0.1\t0.2\t0.3\n", "NUL byte", 2),
        (GOOD + "x" * (1 << 20) + "\t0.1\t0.2\t0.3\n", "line longer than 1048576 bytes", 2),
    ],
)
def test_malformed_rows_are_counted(tmp_path, content, reason, line):
    lexicon = read(tmp_path, content)
    assert lexicon.words == {"calm": (0.8, 0.1)}
    assert lexicon.report.skipped == {reason: 1} and lexicon.report.lines == {reason: [line]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "the file is empty"),
        (HEADER, "header: 1"),
        ("\n\n\n", "blank line: 3"),
        ("joy\t1\n", "fewer than 4 tab-separated columns: 1"),
        (b"\x00\x01\x02" * 50, "NUL byte: 1"),
        ("joy\tnan\tnan\tnan\n", "value is not a number: 1"),
    ],
)
def test_nothing_usable_is_an_error(tmp_path, content, message):
    with pytest.raises(DataError) as error:
        read(tmp_path, content)
    assert "lexicon.txt: no usable row" in str(error.value) and message in str(error.value)


def test_emotion_words_are_all_words_of_the_file_whatever_their_flags(tmp_path):
    path = tmp_path / "emolex.txt"
    path.write_text("Joy\tpositive\t1\njoy\tanger\t0\ntable\tjoy\t0\n\nold  man\tfear\t0\nbad\tjoy\tyes\n \tjoy\t1\nshort\t1\n")
    words, report = read_emotion_words(path)
    assert words == ["joy", "table", "old man"] and report.rows == 4 and report.ignored == {"blank line": 1}
    assert report.skipped == {"the flag is neither 0 nor 1": 1, "word is blank": 1, "not 3 tab-separated columns": 1}
    (tmp_path / "vad.txt").write_text(GOOD)
    with pytest.raises(DataError, match="no usable row .* Expected rows 'word TAB category TAB 0 or 1'"):
        read_emotion_words(tmp_path / "vad.txt")
    with pytest.raises(DataError, match=r"missing\.txt: input file not found"):
        read_emotion_words(tmp_path / "missing.txt")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt: input file not found"):
        VADLexicon.read(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="is a folder, not a file"):
        VADLexicon.read(tmp_path)
    (tmp_path / "lexicon.txt.gz").write_bytes(b"\x1f\x8bnot gzip at all")
    with pytest.raises(DataError, match=r"lexicon\.txt\.gz:1: damaged file"):
        VADLexicon.read(tmp_path / "lexicon.txt.gz")


@pytest.mark.skipif(not (REAL / "nrc_vad").is_dir(), reason=f"no real data at {REAL}")
def test_the_real_lexicon_is_read_whole():
    lexicon = VADLexicon.read(REAL / "nrc_vad" / "NRC-VAD-Lexicon.txt")
    assert len(lexicon) == lexicon.report.rows == 20_007
    assert not lexicon.report.skipped and not lexicon.report.notes
    assert lexicon.report.ignored == {"header": 1}
    intensities = [lexicon.intensity(word) for word in lexicon.words]
    assert -0.11 < min(intensities) < 0.05 and 0.95 < max(intensities) < 1.06
    assert lexicon.intensity("happy") > 0.6 > lexicon.intensity("table")
