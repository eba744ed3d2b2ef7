"""What a source of commonsense inferences is, and what each of them does alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from case_fast.errors import ConfigError

COGNITION_RELATIONS = ("xIntent", "xNeed", "xWant", "xEffect")
REACTION_RELATION = "xReact"
RELATIONS = (*COGNITION_RELATIONS, REACTION_RELATION)

_BLANK = frozenset({"", "none", "no effect", "n a", "na", "nan", "null"})


class KnowledgeSource(Protocol):
    """Anything that answers (text, relation) prompts with short inferences.

    ``identity``: kind and content hash, equal on every machine that holds the same files.
    ``settings``: what else changes the answers, ready for JSON, without k.
    """

    @property
    def identity(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def infer(self, texts: Sequence[str], relations: Sequence[str], k: int) -> list[dict[str, list[str]]]:
        """One dict a text, in the order of ``texts``: relation -> at most ``k`` clean inferences, best first."""
        ...


def is_blank(text: str) -> bool:
    """Whether a field of a knowledge file says nothing: no letter or digit (``___``, ``[]``), or a word for that (``none``)."""
    return " ".join(re.findall(r"[^\W_]+", text)).casefold() in _BLANK


def clean_inferences(texts: Iterable[str], k: int) -> list[str]:
    """The first ``k`` distinct inferences: those that say nothing dropped, white space normalised.

    Two texts that differ only in case or in closing punctuation are one; the first form stays. Reads no further than
    needed.
    """
    kept: dict[str, str] = {}
    for text in texts:
        if len(kept) == k:
            break
        text = " ".join(text.split())
        if not is_blank(text):
            kept.setdefault(text.casefold().strip(" .,;:!?"), text)
    return list(kept.values())


def check_request(relations: Sequence[str], k: int) -> None:
    """Raise `ConfigError` unless ``relations`` are known ones and ``k`` is positive."""
    unknown = [relation for relation in relations if relation not in RELATIONS]
    if unknown:
        raise ConfigError(f"relations: {', '.join(map(repr, unknown))} unknown; choose from {', '.join(RELATIONS)}")
    if k < 1:
        raise ConfigError(f"k: {k} inferences asked for; at least 1 is needed")
