"""What a source of commonsense inferences is, and how one is opened from the command line's ``--knowledge``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from case_fast.errors import ConfigError

COGNITION_RELATIONS = ("xIntent", "xNeed", "xWant", "xEffect")
REACTION_RELATION = "xReact"
RELATIONS = (*COGNITION_RELATIONS, REACTION_RELATION)

_NO_INFERENCE = frozenset({"", "none", "no effect", "n/a"})
_SPEC_FORMS = "'bundled', 'atomic:PATH' (a TSV file or a folder of them) or 'comet:DIR' (a COMET-BART folder)"


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


def clean_inferences(texts: Iterable[str], k: int) -> list[str]:
    """The first ``k`` distinct inferences: "none" and empties dropped, white space normalised.

    Two texts that differ only in case or in closing punctuation are one; the first form stays. Reads no further than
    needed.
    """
    kept: dict[str, str] = {}
    for text in texts:
        if len(kept) == k:
            break
        text = " ".join(text.split())
        key = text.casefold().strip(" .,;:!?")
        if key not in _NO_INFERENCE:
            kept.setdefault(key, text)
    return list(kept.values())


def check_request(relations: Sequence[str], k: int) -> None:
    """Raise `ConfigError` unless ``relations`` are known ones and ``k`` is positive."""
    unknown = [relation for relation in relations if relation not in RELATIONS]
    if unknown:
        raise ConfigError(f"relations: {', '.join(map(repr, unknown))} unknown; choose from {', '.join(RELATIONS)}")
    if k < 1:
        raise ConfigError(f"k: {k} inferences asked for; at least 1 is needed")


def open_source(spec: str, device: str | None = None, **settings: Any) -> KnowledgeSource:
    """Open the source that ``spec`` names: 'bundled', 'atomic:PATH' or 'comet:DIR'.

    ``device`` ('auto', 'cpu', 'cuda') matters to COMET alone; ``settings`` go to the source's constructor.

    Raises:
        ConfigError: the spec or a setting is not an accepted one.
        DataError: the files it names are missing or unusable.
    """
    kind, _, path = spec.partition(":")
    try:
        if spec == "bundled" or (kind == "atomic" and path):
            from case_fast.knowledge.atomic import AtomicRetrieval

            return AtomicRetrieval(path, **settings) if path else AtomicRetrieval.bundled(**settings)
        if kind == "comet" and path:
            from case_fast.knowledge.comet import CometSource

            return CometSource(path, device=device or "auto", **settings)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"--knowledge {spec}: {error}") from error
    raise ConfigError(f"--knowledge {spec!r} is not a source of inferences. Give {_SPEC_FORMS}")
