"""The word-level vocabulary: eight special tokens, then words by falling count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from case_fast.data.text import stop_words
from case_fast.errors import DataError
from case_fast.text_files import read_json

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>", "<cls>", "<sep>", "<speaker>", "<listener>")
PAD, UNK, BOS, EOS, CLS, SEP, SPEAKER, LISTENER = range(len(SPECIALS))


class Vocabulary:
    """Words and their ids; ids 0..7 are `SPECIALS`.

    Raises:
        ValueError: the first eight words are not `SPECIALS`, or a word occurs twice.
    """

    def __init__(self, words: Sequence[str]):
        self.words: tuple[str, ...] = tuple(words)
        self.ids: dict[str, int] = {word: index for index, word in enumerate(self.words)}
        if self.words[: len(SPECIALS)] != SPECIALS:
            raise ValueError(f"a vocabulary starts with the special tokens {' '.join(SPECIALS)}")
        if len(self.ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the word {twice!r} occurs twice in the vocabulary")

    @classmethod
    def build(cls, counts: Counter[str], min_count: int = 1) -> Vocabulary:
        """Words that occur at least ``min_count`` times, by falling count, ties by word."""
        kept = sorted((-count, word) for word, count in counts.items() if count >= min_count and word not in SPECIALS)
        return cls([*SPECIALS, *(word for _, word in kept)])

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.ids

    @cached_property
    def is_stop_word(self) -> np.ndarray:
        """(V,) bool, of each word. Looked up when it is first asked for, as the list of stop words comes with scikit-learn."""
        stop = stop_words()
        return np.array([word in stop for word in self.words])

    def encode(self, tokens: Iterable[str]) -> list[int]:
        return [self.ids.get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        return [self.words[index] for index in ids]

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.words, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote; `DataError` if the file is missing or is no vocabulary."""
        words = read_json(path, "vocabulary", "Prepare the store again")
        try:
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ValueError("it is no list of words")
            return cls(words)
        except ValueError as error:
            raise DataError(path, f"not a vocabulary ({error})", "Prepare the store again") from error
