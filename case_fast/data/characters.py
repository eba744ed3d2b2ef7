"""One spelling for characters that say the same, and marks apart from the words they are glued to."""

from __future__ import annotations

import re
import unicodedata
from itertools import chain

# Zero width space and joiner, soft hyphen, byte order mark, direction marks; the choice of a picture's text or colour form.
_UNSEEN = dict.fromkeys(chain(
    (0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFE0E, 0xFE0F, 0xFEFF), range(0x202A, 0x202F), range(0x2066, 0x206A)))
_SAME = {
    "'": "\u2018\u2019\u201a\u201b\u2032\u2035\u02b9\u02bc\u00b4`",
    '"': "\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb\u2039\u203a\u301d\u301e\u301f\u300c\u300d\u300e\u300f",
    "-": "\u2010\u2011\u2043\u2212",  # hyphens and the minus sign
    "--": "\u2012\u2013\u2014\u2015\u2e3a\u2e3b\ufe58",  # dashes
    "...": "\u2026\u22ef", "..": "\u2025", "!!": "\u203c", "!?": "\u2049", "?!": "\u2048", "??": "\u2047",
    " . ": "\u3002\uff61", " , ": "\u3001\uff64", "~": "\u301c",
}
# Full-width and small forms, ligatures, letters in mathematical styles. Not all that NFKC unifies: 1½ would become 11⁄2.
_STYLED = chain(range(0xFF01, 0xFF5F), range(0xFE50, 0xFE6C), range(0xFB00, 0xFB07), range(0x1D400, 0x1D800))
_PLAIN = {code: unicodedata.normalize("NFKC", chr(code)) for code in _STYLED} | {
    ord(other): plain for plain, others in _SAME.items() for other in others}

_VARIANT = dict.fromkeys((0x20E3, *range(0x1F3FB, 0x1F400)))  # the frame of a keycap, skin tones
_PICTURE = (r"[\u00a9\u00ae\u2122\u2190-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001f1e5\U0001f200-\U0001f3fa"
            r"\U0001f400-\U0001faff][\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*")
_FLAG, _KEY = r"[\U0001f1e6-\U0001f1ff]{2}", r"[0-9#*]\u20e3"
_MARK = re.compile(rf"{_FLAG}|{_KEY}|{_PICTURE}(?:\u200d{_PICTURE})*|[^\w\s\x00-\x7f]")
# A hyphen within a word stays, and so does the sign of a number; any other dash is a mark.
_DASH = re.compile(r"-{2,}|(?<!\w)-(?!\.?\d)|(?<=\w)-(?!\w)")
# A slash parts words, but "24/7", "n/a" and "w/o" are one; an underscore counts as a mark at the edge of a word.
_GLUE = re.compile(r"[~|\\=^]|(?=[/_])(?:(?<=[^\W\d_]{2})/(?=[^\W\d_])|(?<!\w)/|/(?!\w)|(?<!\w)_+|(?<!_)_+(?!\w))")


def visible(text: str) -> str:
    """The text without characters that nobody sees."""
    return text.translate(_UNSEEN)


def plain(text: str) -> str:
    """The text with one spelling for each quote, dash, ellipsis and styled letter, and blanks around what is no part of a word:
    emoji (a sequence is one, without skin tones), symbols, dashes (all one ``-``), slashes between words."""
    text = visible(text).translate(_PLAIN)
    if not text.isascii():
        text = _MARK.sub(_apart, unicodedata.normalize("NFC", text))
    return _GLUE.sub(r" \g<0> ", _DASH.sub(" - ", text))


def _apart(found: re.Match[str]) -> str:
    mark = found[0]
    if len(mark) > 1:
        return f" {mark.translate(_VARIANT)} "
    return f" {mark} " if unicodedata.category(mark)[0] in "PS" else mark  # else a vowel sign, a combining accent
