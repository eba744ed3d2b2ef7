"""From raw text to words and back: contractions, tokens, sentences, stop words."""

from __future__ import annotations

import re
from functools import cache
from itertools import cycle
from typing import Any

from case_fast.optional import needed

# Irregular forms first; the regular endings below cover the rest. "'s" is expanded only after words where it can hardly be
# a possessive; elsewhere it stays a token of its own.
CONTRACTIONS: dict[str, str] = {
    "won't": "will not", "can't": "can not", "cannot": "can not", "shan't": "shall not", "ain't": "is not",
    "let's": "let us", "y'all": "you all", "ma'am": "madam", "o'clock": "oclock", "'cause": "because", "'em": "them",
    "'til": "until", "it's": "it is", "he's": "he is", "she's": "she is", "that's": "that is", "there's": "there is",
    "here's": "here is", "what's": "what is", "who's": "who is", "where's": "where is", "how's": "how is",
    "when's": "when is", "why's": "why is", "everything's": "everything is", "something's": "something is",
    "nothing's": "nothing is", "everyone's": "everyone is",
}
_ENDINGS = {"n't": " not", "'re": " are", "'ll": " will", "'ve": " have", "'m": " am", "'d": " would"}
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u00b4": "'", "`": "'", "\u201c": '"', "\u201d": '"', "\u2026": "..."})
_IRREGULAR = re.compile(r"(?<![\w'])(" + "|".join(map(re.escape, sorted(CONTRACTIONS, key=len, reverse=True))) + r")(?!\w)")
_ENDING = re.compile(r"(?<=\w)(" + "|".join(map(re.escape, _ENDINGS)) + r")(?!\w)")
# A sentence ends at a run of . ! ? before white space or the text's end, or where the next sentence was glued on ("well.I").
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*(?:\s+|(?=[A-Z][a-z' ]))")
_GLUED = re.compile(r"(?<=[a-z]{2})([.!?,]+)(?=[A-Za-z])")
_PERIOD = re.compile(r"(?<=[^\s.])\.(?=\s)")  # the tokenizer parts a full stop only at the end of the text

# scikit-learn's list holds a few words that carry feeling or situation; a concept graph needs them.
_CONTENT_WORDS = {"alone", "cry", "fire", "interest", "serious", "sincere", "bill", "empty", "found", "system"}
_INTERJECTIONS = {"oh", "ok", "okay", "yes", "yeah", "hi", "hello"}


# Training on a store that lies there needs none of these packages, so they are imported when a text is to be read or written.
@cache
def stop_words() -> frozenset[str]:
    """Words that no concept belongs to, lower-cased."""
    found = needed("sklearn.feature_extraction.text", "the list of stop words").ENGLISH_STOP_WORDS
    return frozenset(found - _CONTENT_WORDS) | _INTERJECTIONS


@cache
def _tokenizer() -> Any:
    return needed("nltk.tokenize", "cutting a text into words").NLTKWordTokenizer()


@cache
def _detokenizer() -> Any:
    return needed("nltk.tokenize.treebank", "writing words as a text").TreebankWordDetokenizer()


def normalize_space(text: str) -> str:
    """The text with every run of white space as one blank, ends trimmed."""
    return " ".join(text.split())


def tokenize(text: str) -> list[str]:
    """Lower-cased words and punctuation, contractions written out (docs/paper.md)."""
    text = text.translate(_QUOTES).lower()
    text = _IRREGULAR.sub(lambda match: CONTRACTIONS[match[0]], text)
    text = _ENDING.sub(lambda match: _ENDINGS[match[0]], text)
    text = _PERIOD.sub(" .", _GLUED.sub(r"\1 ", text))
    # The tokenizer writes double quotes as `` and ''; one spelling is enough for a vocabulary.
    return ['"' if token in ("``", "''") else token for token in _tokenizer().tokenize(text)]


def detokenize(words: list[str]) -> str:
    """Words as a person would write them: punctuation attached, sentences and "I" capitalised."""
    marks = cycle(("``", "''"))  # double quotes open and close by turns, as the detokenizer writes them
    text = _detokenizer().detokenize([next(marks) if word == '"' else word for word in words])
    text = re.sub(r"\s+([.,!?;:%)])", r"\1", text)
    text = re.sub(r"(?<=\.\.\.)(?=\w)", " ", text)
    text = re.sub(r"\bi\b(?!\.\w)", "I", text)
    return re.sub(r"(^\W*|(?<!\.\.)[.!?]\s+)([a-z])", lambda match: match[1] + match[2].upper(), text)


def split_sentences(text: str) -> list[str]:
    """Cut an utterance at sentence ends (. ! ?); at least one piece, none of them without a letter or digit."""
    text = normalize_space(text)
    pieces: list[str] = []
    for piece in _SENTENCE_END.split(text):
        piece = piece.strip()
        if not re.search(r"\w", piece):
            continue
        pieces.append(piece)
    return pieces or [text]


def is_word(token: str) -> bool:
    """Whether a token is a word that can have concepts: it has a letter and is no stop word."""
    return token not in stop_words() and any(character.isalpha() for character in token)
