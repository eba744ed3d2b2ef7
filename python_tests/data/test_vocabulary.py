"""The vocabulary, and what happens when a damaged one is loaded."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from case_fast.data.text import tokenize
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, PAD, SEP, SPEAKER, SPECIALS, UNK, Vocabulary
from case_fast.errors import DataError


def test_special_tokens_come_first_in_their_order():
    vocabulary = Vocabulary(SPECIALS)
    assert vocabulary.decode([PAD, UNK, BOS, EOS, CLS, SEP, SPEAKER, LISTENER]) == list(SPECIALS)
    assert [vocabulary.ids[word] for word in SPECIALS] == list(range(8)) and len(vocabulary) == 8


def test_build_orders_by_count_then_word():
    counts = Counter({"b": 3, "a": 3, "z": 5, "rare": 1, "<unk>": 99})
    assert Vocabulary.build(counts).words[8:] == ("z", "a", "b", "rare")
    assert Vocabulary.build(counts, min_count=2).words[8:] == ("z", "a", "b")
    assert Vocabulary.build(counts, min_count=6).words == SPECIALS


def test_unknown_words_become_unk():
    vocabulary = Vocabulary([*SPECIALS, "cat"])
    assert vocabulary.encode(["cat", "Cat", "dog", ""]) == [8, UNK, UNK, UNK]
    assert "cat" in vocabulary and "dog" not in vocabulary


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "starts with the special tokens"),
        (["cat"], "starts with the special tokens"),
        (SPECIALS[::-1], "starts with the special tokens"),
        ([*SPECIALS, "a", "b", "a"], "'a' occurs twice"),
        ([*SPECIALS, "<pad>"], "'<pad>' occurs twice"),
    ],
)
def test_wrong_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(words)


@given(st.text(max_size=60))
def test_no_text_can_name_a_special_token(text):
    assert not set(SPECIALS) & set(tokenize(text + " <pad> <speaker>" + text))


def test_saved_and_loaded_it_holds_the_same_words(tmp_path):
    words = [*SPECIALS, "cat", 'quote"', "naïve", "🙂", "\u2028", "back\\slash"]
    Vocabulary(words).save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json").words == tuple(words)
    assert (tmp_path / "v.json").read_text(encoding="utf-8").count("\n") > len(SPECIALS)  # a word a line, for people


DAMAGED = {
    "empty": "",
    "cut short": json.dumps([*SPECIALS, "cat"])[:-5],
    "an object": json.dumps(dict.fromkeys(SPECIALS, 1)),
    "a string": '"<pad>"',
    "a number": "17",
    "null": "null",
    "numbers in it": json.dumps([*SPECIALS, 5]),
    "null in it": json.dumps([*SPECIALS, None]),
    "lists in it": json.dumps([*SPECIALS, ["cat"]]),
    "no special tokens": json.dumps(["cat", "dog"]),
    "a word twice": json.dumps([*SPECIALS, "cat", "cat"]),
    "nested 200 000 deep": "[" * 200_000,
    "python": "__import__('os').getcwd()",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_a_typed_error(tmp_path, case):
    path = tmp_path / "vocabulary.json"
    path.write_text(DAMAGED[case], encoding="utf-8")
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        Vocabulary.load(path)
    assert time.monotonic() - began < 1
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith("Prepare the store again.")


def test_missing_files_noise_and_links_to_themselves_are_named(tmp_path):
    path = tmp_path / "vocabulary.json"
    with pytest.raises(DataError, match="vocabulary not found"):
        Vocabulary.load(path)
    path.write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(DataError, match="vocabulary is damaged"):
        Vocabulary.load(path)
    path.unlink()
    path.symlink_to(path)  # a link to itself
    with pytest.raises(DataError, match="vocabulary not found"):
        Vocabulary.load(path)
    path.unlink()
    path.symlink_to("/dev/zero")  # without end
    with pytest.raises(DataError, match="vocabulary not found"):
        Vocabulary.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="vocabulary is a folder, not a file"):
        Vocabulary.load(path)
