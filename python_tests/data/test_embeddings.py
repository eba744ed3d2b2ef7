"""The GloVe reader: what it takes, and that every row it leaves out is counted."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from case_fast.data.embeddings import read_glove
from case_fast.data.vocabulary import SPECIALS, UNK, Vocabulary
from case_fast.errors import DataError

VOCABULARY = Vocabulary([*SPECIALS, "cat", "dog", "exam", "5", "café"])
GOOD = ["the 9 9 9", "cat 1 2 3", ". 9 9 9", "dog 4 5 6.5", "zebra 9 9 9", "exam -7e-1 8 9"]
CAT, DOG, EXAM, FIVE, CAFE = range(8, 13)
EXPECTED = {CAT: [1, 2, 3], DOG: [4, 5, 6.5], EXAM: [-0.7, 8, 9]}


def read(folder: Path, content: list[str] | bytes, name: str = "glove.txt"):
    raw = content if isinstance(content, bytes) else "\n".join([*content, ""]).encode()
    (folder / name).write_bytes(raw)
    ids, vectors, report = read_glove(folder / name, VOCABULARY)
    assert ids.dtype == np.int32 and vectors.dtype == np.float32 and (np.diff(ids) > 0).all()
    assert report.rows == len(ids) == len(vectors)
    return {int(i): vector.tolist() for i, vector in zip(ids, vectors, strict=True)}, report


def same(found: dict[int, list[float]], expected: dict[int, list[float]]) -> bool:
    return found.keys() == expected.keys() and all(np.allclose(found[i], expected[i]) for i in expected)


def test_the_words_of_the_vocabulary_get_their_vectors(tmp_path):
    found, report = read(tmp_path, GOOD)
    assert same(found, EXPECTED) and report.ignored == {"not in the vocabulary": 3} and not report.skipped
    assert "3 rows; not needed 3 (not in the vocabulary)" in report.summary()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (gzip.compress("\n".join(GOOD).encode(), mtime=0), "glove.txt.gz"),
        ("\r\n".join(GOOD).encode(), "crlf.txt"),
        (b"\xef\xbb\xbf" + "\n".join(GOOD).encode(), "bom.txt"),
        ("".join(f"{line} \n" for line in GOOD).encode(), "blank_at_the_end.txt"),
    ],
)
def test_harmless_variants_read_the_same(tmp_path, content, name):
    assert same(read(tmp_path, content, name)[0], EXPECTED)


def test_a_word2vec_header_is_no_word_and_must_fit(tmp_path):
    found, report = read(tmp_path, ["6 3", *GOOD])
    assert same(found, EXPECTED) and report.ignored["header"] == 1
    with pytest.raises(DataError, match=r"glove\.txt:1: the header says 4 numbers a word, the rows hold 3"):
        read(tmp_path, ["6 4", *GOOD])
    # the second of two such lines is the row of a word
    assert read(tmp_path, ["2 1", "5 3", "cat 4"])[0] == {FIVE: [3], CAT: [4]}


def test_words_may_hold_blanks_and_odd_signs(tmp_path):
    rows = [". . 9 9 9", "new york city 9 9 9", "\u00a0 9 9 9", "5 1 1 1", "café 2 2 2", *GOOD, "at name@domain.com 9 9 9"]
    found, report = read(tmp_path, rows)
    assert same(found, EXPECTED | {FIVE: [1, 1, 1], CAFE: [2, 2, 2]}) and not report.skipped


def test_a_special_token_of_the_file_is_ours(tmp_path):
    assert read(tmp_path, ["<unk> 1 1 1", *GOOD])[0][UNK] == [1, 1, 1]


MALFORMED = {
    "too few numbers": ("cat 1 2", "too few numbers"),
    "only the word": ("cat", "too few numbers"),
    "blank line": ("", "too few numbers"),
    "a word for a number": ("cat 1 two 3", "not a number"),
    "two blanks": ("cat 1  3", "not a number"),
    "comma": ("cat 1 2,5 3", "not a number"),
    "NaN": ("cat 1 nan 3", "NaN or infinite value"),
    "infinity": ("cat 1 -inf 3", "NaN or infinite value"),
    "too large for float32": ("cat 1 1e39 3", "NaN or infinite value"),
    "bad UTF-8": (b"cat\xff 1 2 3", "not UTF-8"),
    "NUL": (b"cat 1 2\0 3", "NUL byte"),
    "10 MB line": ("cat " + "1 " * 5_000_000, "line longer than 1048576 bytes"),
}


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_row_is_counted_with_its_line(tmp_path, case, place):
    bad, reason = MALFORMED[case]
    rows = [line.encode() for line in GOOD]
    rows.insert(place, bad if isinstance(bad, bytes) else bad.encode())
    found, report = read(tmp_path, b"\n".join(rows) + b"\n")
    assert same(found, EXPECTED)
    assert report.skipped == {reason: 1} and report.lines == {reason: [place + 1]}
    assert report.rows + report.skipped.total() + report.ignored.total() == len(rows)


def test_the_first_vector_of_a_word_wins(tmp_path):
    found, report = read(tmp_path, [*GOOD, "cat 0 0 0", "dog 0 0 0"])
    assert same(found, EXPECTED) and report.lines == {"word occurs twice": [7, 8]}


@pytest.mark.parametrize("first", ["cat 1 2", "a b c 1 2 3", "cat"])
def test_one_odd_first_row_does_not_decide_the_dimension(tmp_path, first):
    found, _ = read(tmp_path, [first, "cat 1 2 3", "dog 4 5 6.5", "exam -0.7 8 9"])
    assert same(found, EXPECTED)


UNUSABLE = {
    "empty": (b"", "no usable row (the file is empty)"),
    "blank": (b"\n\n\n", "no usable row (too few numbers: 3)"),
    "only a header": (b"400000 300\n", "no usable row (header: 1)"),
    "no word in common": (b"x 1 2\ny 3 4\n", "no usable row (not in the vocabulary: 2)"),
    "words only": (b"cat\ndog\n", "no usable row (too few numbers: 2)"),
    "binary": (random.Random(0).randbytes(100_000), "no usable row ("),
    "tabs": (b"cat\t1\t2\ndog\t3\t4\n", "no usable row (too few numbers: 2)"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_file_is_a_typed_error(tmp_path, case):
    content, message = UNUSABLE[case]
    with pytest.raises(DataError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'glove.txt'}: {message}")
    assert "Expected a word of the vocabulary and its numbers" in str(caught.value)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: input file not found"):
        read_glove(tmp_path / "nowhere.txt", VOCABULARY)
    with pytest.raises(DataError, match=r": input file is a folder, not a file"):
        read_glove(tmp_path, VOCABULARY)
    packed = gzip.compress("\n".join(f"w{i} {random.random()}" for i in range(9999)).encode())
    with pytest.raises(DataError, match=r"glove\.txt\.gz:\d+: damaged file"):
        read(tmp_path, packed[: len(packed) // 2], "glove.txt.gz")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.one_of(
            st.lists(st.sampled_from(["cat", "dog", "x", "1", "2.5", "nan", "²", "", "café", "1e99"]), max_size=6).map(" ".join),
            st.text(st.characters(blacklist_characters="\n\0", blacklist_categories=["Cs"]), max_size=20),
        ),
        max_size=12,
    )
)
def test_nothing_is_lost_silently(tmp_path, rows):
    try:
        found, report = read(tmp_path, rows)
    except DataError as error:
        assert "no usable row" in str(error) or ":1: the header says" in str(error)
        return
    assert report.rows + report.skipped.total() + report.ignored.total() == len(rows)
    assert all(np.isfinite(vector).all() for vector in found.values())
