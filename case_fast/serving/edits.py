"""What if: other turns, other knowledge, another gate. What an edit may say stands in docs/explain.md."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from case_fast.data.edited import edges_of, with_concepts, with_inferences, with_reactions
from case_fast.data.empathetic_dialogues import Turn
from case_fast.data.featurizer import Example, Featurizer, TextTable
from case_fast.data.text import normalize_space
from case_fast.data.vocabulary import SPECIALS
from case_fast.errors import ConfigError
from case_fast.knowledge import COGNITION_RELATIONS
from case_fast.models import DialogueModel
from case_fast.serving.lines import reads_inferences, words_of

# (op, what) -> what such an edit must say, and what it may say
GRAMMAR: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("remove", "inference"): (("relation", "text"), ()),
    ("replace", "inference"): (("relation", "text", "with"), ()),
    ("add", "inference"): (("relation", "text"), ("of",)),
    ("remove", "reaction"): (("text",), ()),
    ("replace", "reaction"): (("text", "with"), ()),
    ("add", "reaction"): (("text",), ("of",)),
    ("remove", "concept"): (("text",), ()),
    ("replace", "concept"): (("text", "with"), ("intensity",)),
    ("add", "concept"): (("text", "token"), ("intensity",)),
    ("remove", "turn"): (("turn",), ()),
    ("replace", "turn"): (("turn", "with"), ()),
    ("add", "turn"): (("turn", "text", "by"), ()),
    ("set", "gate"): (("value",), ()),
    ("remove", "source"): (("source",), ()),
}
SOURCES = ("inferences", "reactions", "concepts")
_TEXTS = ("relation", "text", "with", "token", "by", "source")


class EditError(ConfigError):
    """An edit that cannot be carried out; ``number``: which of the list, from 1."""

    def __init__(self, number: int, name: str, problem: str):
        self.number = number
        super().__init__(f"edit {number} ({name}): {problem}")


@dataclass(frozen=True)
class Edit:
    """One edit; ``said``: as it was given. `read_edits` makes them."""

    number: int
    op: str
    what: str
    said: Mapping[str, Any]

    def error(self, problem: str) -> EditError:
        return EditError(self.number, f"{self.op} {self.what}", problem)

    def text(self, name: str) -> str:
        """A text that is not blank, as the featurizer takes it."""
        found = normalize_space(self.said[name].encode("utf-8", "replace").decode())
        if not found:
            raise self.error(f"{name} is blank")
        return found

    def number_in(self, name: str, low: float, high: float) -> float:
        value = self.said[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        return float(value)

    def place(self, name: str, count: int) -> int:
        """A place among ``count``, from 0."""
        value = self.said[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise self.error(f"{name} must be a whole number from 0 to {count - 1}, not {value!r}")
        return value

    def one_of(self, name: str, known: Sequence[str]) -> str:
        value = self.said[name]
        if value not in known:
            raise self.error(f"{name} must be {' or '.join(known)}, not {value!r}")
        return value


def read_edits(given: Iterable[Mapping[str, Any]]) -> list[Edit]:
    """Check what edits say, before anything is known of the dialogue.

    Raises:
        EditError: one is none, lacks something or says too much.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ConfigError("edits must be a list of objects, each with op and what")
    return [_read_edit(number, said) for number, said in enumerate(given, 1)]


def _read_edit(number: int, said: Any) -> Edit:
    if not isinstance(said, Mapping):
        raise EditError(number, "no object", 'an edit is an object such as {"op": "remove", "what": "concept", "text": "sad"}')
    op, what = said.get("op"), said.get("what")
    if (op, what) not in GRAMMAR:
        known = ", ".join(" ".join(pair) for pair in GRAMMAR)
        raise EditError(number, f"{op} {what}", f"there is no such edit; there are {known}")
    edit, (must, may) = Edit(number, op, what, said), GRAMMAR[op, what]
    if missing := [name for name in must if name not in said]:
        raise edit.error(f"{' and '.join(missing)} must be given")
    if unknown := [str(name) for name in said if name not in ("op", "what", *must, *may)]:
        raise edit.error(f"{', '.join(unknown)} has no meaning here; it takes {', '.join((*must, *may))}")
    for name in _TEXTS:
        if name in said and not isinstance(said[name], str):
            raise edit.error(f"{name} must be a text, not {said[name]!r}")
    return edit


# ---- turns, before anything is inferred from them


def edited_turns(turns: Sequence[Turn], edits: Iterable[Edit]) -> list[Turn]:
    """The dialogue with its turns removed, replaced and added, one edit after the other; the others keep their speakers.

    Raises:
        EditError: there is no such turn; or what is left does not end with a turn of the speaker's.
    """
    turns = list(turns)
    for edit in edits:
        if edit.what != "turn":
            continue
        place = edit.place("turn", len(turns) + (edit.op == "add"))
        if edit.op == "remove":
            del turns[place]
        elif edit.op == "replace":
            turns[place] = Turn(edit.text("with"), turns[place].by_speaker)
        else:
            turns.insert(place, Turn(edit.text("text"), edit.one_of("by", ("speaker", "listener")) == "speaker"))
        last = edit
    if any(edit.what == "turn" for edit in edits) and not (turns and turns[-1].by_speaker):
        raise last.error("the dialogue must end with a turn of the speaker's, to which the model replies")
    return turns


# ---- knowledge and gate


@dataclass
class Draft:
    """The knowledge of an example, to be changed.

    Attributes:
        inferences: (relation, text, sub-utterance). reactions: (text, sub-utterance). concepts: word -> its intensity and the
            words of the context that it hangs on, by their places.
        gate: what it is set to, or None.
    """

    inferences: list[tuple[str, str, int]]
    reactions: list[tuple[str, int]]
    concepts: dict[str, tuple[float, tuple[int, ...]]]
    gate: float | None = None
    touched: set[str] = field(default_factory=set)


def edited(example: Example, texts: TextTable, edits: Sequence[Edit], model: DialogueModel, featurizer: Featurizer
           ) -> tuple[Example, float | None]:
    """The example with other knowledge, new texts among ``texts``, and what the gate is set to: edits of all but turns.

    Raises:
        EditError: something to be changed is not there, cannot be, or is nothing that the model reads.
    """
    draft = _draft(example, texts)
    words = words_of(example, texts)
    for edit in edits:
        if edit.what != "turn":
            _Carried(edit, draft, len(example.sub_utterance), words, model, featurizer).out()
    for kind in draft.touched:
        example = _REBUILT[kind](example, texts, draft)
    return example, draft.gate


def _draft(example: Example, texts: TextTable) -> Draft:
    hangs: dict[int, list[int]] = {}
    for word, of in edges_of(example):
        hangs.setdefault(of, []).append(word)
    known = texts.vocabulary.decode(example.concept.tolist())
    return Draft(
        [(COGNITION_RELATIONS[relation], texts.text(text), sub) for text, relation, sub in
         zip(example.knowledge.tolist(), example.knowledge_relation.tolist(), example.knowledge_sub.tolist(), strict=True)],
        [(texts.text(text), sub) for text, sub in zip(example.reaction.tolist(), example.reaction_sub.tolist(), strict=True)],
        {word: (intensity, tuple(hangs.get(of, ()))) for of, (word, intensity) in
         enumerate(zip(known, example.concept_intensity.tolist(), strict=True))},
    )


def _with_drafted_inferences(example: Example, texts: TextTable, draft: Draft) -> Example:
    rows = [(texts.add(text), sub, COGNITION_RELATIONS.index(relation)) for relation, text, sub in draft.inferences]
    return with_inferences(example, *np.array(rows, dtype=np.int32).reshape(-1, 3).T)


def _with_drafted_reactions(example: Example, texts: TextTable, draft: Draft) -> Example:
    rows = [(texts.add(text), sub) for text, sub in draft.reactions]
    return with_reactions(example, *np.array(rows, dtype=np.int32).reshape(-1, 2).T)


def _with_drafted_concepts(example: Example, texts: TextTable, draft: Draft) -> Example:
    edges = [(word, of) for of, (_, tokens) in enumerate(draft.concepts.values()) for word in tokens]
    concept = np.array(texts.vocabulary.encode(draft.concepts), dtype=np.int32)
    return with_concepts(example, concept, np.array([w for w, _ in draft.concepts.values()], dtype=np.float32), edges)


_REBUILT: dict[str, Callable[[Example, TextTable, Draft], Example]] = {
    "inferences": _with_drafted_inferences, "reactions": _with_drafted_reactions, "concepts": _with_drafted_concepts,
}


@dataclass
class _Carried:
    """An edit on its way into a draft."""

    edit: Edit
    draft: Draft
    subs: int
    words: list[str]
    model: DialogueModel
    featurizer: Featurizer

    def out(self) -> None:
        if self.edit.what == "gate":
            if self.model.balance is None:
                raise self.edit.error(f"{self.kind_of_model} has no gate")
            self.draft.gate = self.edit.number_in("value", 0, 1)
            return
        kind = self.edit.one_of("source", SOURCES) if self.edit.what == "source" else f"{self.edit.what}s"
        needs = self.model.needs
        if not ("concept" in needs if kind == "concepts" else reads_inferences(needs)):
            raise self.edit.error(f"{self.kind_of_model} reads no {kind}")
        self.draft.touched.add(kind)
        if self.edit.what == "source":
            getattr(self.draft, kind).clear()
        else:
            getattr(self, f"_{kind}")()

    @property
    def kind_of_model(self) -> str:
        return f"the model {self.model.config.kind}"

    def _inferences(self) -> None:
        edit, rows = self.edit, self.draft.inferences
        relation, text = edit.one_of("relation", COGNITION_RELATIONS), edit.text("text")
        if edit.op == "add":
            rows.append((relation, text, self._sub()))
            return
        read = [found for kind, found, sub in rows if kind == relation and self._reads(sub)]
        self._there(text, read, f"{relation} inference")
        new = self._new_texts()
        rows[:] = [row for row in rows if row[:2] != (relation, text)] + [
            (relation, word, sub) for kind, found, sub in rows if (kind, found) == (relation, text) for word in new]

    def _reactions(self) -> None:
        edit, rows = self.edit, self.draft.reactions
        text = edit.text("text")
        if edit.op == "add":
            rows.append((text, self._sub()))
            return
        self._there(text, [found for found, sub in rows if self._reads(sub)], "reaction")
        new = self._new_texts()
        rows[:] = [row for row in rows if row[0] != text] + [(word, sub) for found, sub in rows if found == text for word in new]

    def _concepts(self) -> None:
        edit, concepts = self.edit, self.draft.concepts
        text = edit.text("text").lower()
        if edit.op == "add":
            token = edit.text("token").lower()
            self._there(token, self.words, "word of the context")
            places = tuple(place for place, word in enumerate(self.words) if word == token)
            self._check_new(text)
            concepts[text] = (self._intensity(text), places)
            return
        self._there(text, list(concepts), "concept")
        if edit.op == "remove":
            del concepts[text]
            return
        new = edit.text("with").lower()
        self._check_new(new)
        changed = (self._intensity(new), concepts[text][1])
        self.draft.concepts = {new if word == text else word: changed if word == text else of for word, of in concepts.items()}

    def _sub(self) -> int:
        """The sub-utterance that something new is of; the whole utterance where the edit does not say."""
        sub = self.edit.place("of", self.subs) if "of" in self.edit.said else 0
        if not self._reads(sub):
            raise self.edit.error(f"{self.kind_of_model} reads what is inferred from the whole utterance alone: of must be 0")
        return sub

    def _reads(self, sub: int) -> bool:
        """Whether the model reads what is inferred from a sub-utterance."""
        return reads_inferences(self.model.needs, sub)

    def _new_texts(self) -> list[str]:
        """What takes the place of what goes; nothing where it is only removed."""
        return [self.edit.text("with")] if self.edit.op == "replace" else []

    def _check_new(self, word: str) -> None:
        if word in SPECIALS or word not in self.featurizer.vocabulary:
            raise self.edit.error(f"{word!r} is no word of the vocabulary, as a concept must be")
        if word in self.draft.concepts:
            raise self.edit.error(f"the concept {word!r} is there already")

    def _intensity(self, word: str) -> float:
        if "intensity" in self.edit.said:
            return self.edit.number_in("intensity", 0, 1)
        known = self.featurizer.intensity.get(word)
        if known is None or not math.isfinite(known):
            raise self.edit.error(f"{word!r} has no known emotion intensity: give intensity, from 0 to 1")
        return known

    def _there(self, text: str, known: Sequence[str], what: str) -> None:
        if text not in known:
            close = difflib.get_close_matches(text, known, 1)
            raise self.edit.error(f"there is no {what} {text!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
