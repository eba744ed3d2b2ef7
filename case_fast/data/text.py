"""From raw text to words and back: contractions, tokens, sentences, stop words."""

from __future__ import annotations

import re
from functools import cache
from itertools import cycle
from typing import Any

from case_fast.data.characters import plain, visible
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
_IRREGULAR = re.compile(r"(?<![\w'])(" + "|".join(map(re.escape, sorted(CONTRACTIONS, key=len, reverse=True))) + r")(?!\w)")
_ENDING = re.compile(r"(?<=\w)(" + "|".join(map(re.escape, _ENDINGS)) + r")(?!\w)")
# A sentence ends at a run of . ! ? before white space or the text's end, or where the next sentence was glued on ("well.I").
_SENTENCE_END = re.compile(r"(?<=[.!?…。．！？])[\"'”’»)\]）]*(?:\s+|(?=[A-Z][a-z' ]))")
# ... but not at the full stop of an abbreviation or initial, unless what follows opens a sentence: a capitalised word of
# `_OPENING`; in a text without capitals one of those that name who; after `_CLOSING` any capitalised word. "I" is no initial,
# and "no." is an abbreviation before a number alone.
_SHORT = re.compile(r"(?<![\w.'&])((?:[a-z]\.)*[a-z]|ph\.d|[a-z]{2,6})\.$")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev gen sgt capt col lt gov sen rep st mt ft jr sr vs etc ph.d inc corp ltd dept appt apt approx ave blvd "
    "jan feb apr aug sept oct nov dec".split()
)
_CLOSING = {"etc", "a.m", "p.m"}
_OPENING = re.compile(
    r"(?P<who>(?:i|im|ive|he|she|it|its|we|they|you|there|then)\b)|(?P<mark>[^\w\s]+(?!\S))|"
    r"(?:this|that|these|those|and|but|so|my|our|his|her|their|what|when|where|why|how|now|not|no|yes|yeah|oh|just|if|after|"
    r"before|even|also|although|because|since|while|luckily|thanks?)\b", re.IGNORECASE)
# the look ahead in front is for speed alone
_GLUED = re.compile(r"(?=[.!?,])(?:(?:(?<=[^\W\d_]{2})|(?<=\s))[.!?,]+(?=[^\W\d_])|(?<=[^\W\d_]{2}),(?=\d))")
_PERIOD = re.compile(r"(?<=[^\s.])\.(?=[\"')\]}]*(?:\s|$)|[\")\]}])")  # the tokenizer parts only the last one

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
    """The text with every run of white space as one blank, ends trimmed, without characters that nobody sees."""
    return " ".join(visible(text).split())


def tokenize(text: str) -> list[str]:
    """Lower-cased words and punctuation, contractions written out, emoji and dashes apart (docs/paper.md)."""
    text = plain(text).lower()
    text = _IRREGULAR.sub(lambda match: CONTRACTIONS[match[0]], text)
    text = _ENDING.sub(lambda match: _ENDINGS[match[0]], text)
    text = _PERIOD.sub(" .", _GLUED.sub(r"\g<0> ", text))
    # The tokenizer writes double quotes as `` and ''; one spelling is enough for a vocabulary.
    return ['"' if token in ("``", "''") else token for token in _tokenizer().tokenize(text)]


def detokenize(words: list[str]) -> str:
    """Words as a person would write them: punctuation attached, sentences and "I" capitalised."""
    marks = cycle(("``", "''"))  # double quotes open and close by turns, as the detokenizer writes them
    text = _detokenizer().detokenize([next(marks) if word == '"' else word for word in words])
    text = re.sub(r"\s+([.,!?;:%)])", r"\1", text)
    text = re.sub(r"(?<=\.\.\.)(?=\w)", " ", text)
    text = re.sub(r"(?<=\w) (/) (?=\w)|(?<=[£€¥₹¿¡])( )(?=\w)", lambda match: match[1] or "", text)
    text = re.sub(r"\bi\b(?!\.\w)", "I", text)
    return re.sub(r"(^\W*|(?<!\.\.)[.!?]\s+)([a-z])", lambda match: match[1] + match[2].upper(), text)


def split_sentences(text: str) -> list[str]:
    """Cut an utterance at sentence ends (. ! ?); at least one piece, none of them without a letter or digit."""
    text = normalize_space(text)
    lower, start = text.islower(), 0  # in a text without capitals nothing can be told from one that is missing
    pieces: list[str] = []
    for end in _SENTENCE_END.finditer(text):
        if not _abbreviated(text, end.start(), end.end(), lower):
            pieces.append(text[start : end.start()])
            start = end.end()
    pieces = [piece for piece in (*pieces, text[start:]) if re.search(r"\w", piece)]
    return pieces or [text]


def _abbreviated(text: str, stop: int, following: int, lower: bool) -> bool:
    """Whether the mark before ``stop`` is the full stop of an abbreviation that ends no sentence; the next word is at
    ``following``, and ``lower`` says that the text has no capitals."""
    found = _SHORT.search(text[max(0, stop - 12) : stop].lower())
    if found is None or following == len(text):
        return False
    short, first = found[1], text[following]
    if short == "no":
        return first.isdigit()
    if short == "i" or not ("." in short or len(short) == 1 or short in _ABBREVIATIONS):
        return False
    opening = _OPENING.match(text, following)
    if opening is None:
        return not (first.isupper() and short in _CLOSING)
    return not (first.isupper() or opening["mark"] or lower and opening["who"])


def is_word(token: str) -> bool:
    """Whether a token is a word that can have concepts: it has a letter and is no stop word."""
    return token not in stop_words() and any(character.isalpha() for character in token)
