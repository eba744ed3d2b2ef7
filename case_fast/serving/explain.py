"""Why a model replied so: what it weighed, what would have changed the reply, what an edit changes (docs/explain.md)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import Batch
from case_fast.data.empathetic_dialogues import EMOTIONS, Turn
from case_fast.data.featurizer import Example, Featurizer, TextTable
from case_fast.data.pack import make_batch
from case_fast.data.text import detokenize, tokenize
from case_fast.data.vocabulary import EOS, SEP, SPECIALS
from case_fast.errors import ConfigError
from case_fast.generation import Generated, GenerationConfig, generate
from case_fast.models import DialogueModel, Reading, Why
from case_fast.models.base import evaluating
from case_fast.models.results import Choice
from case_fast.serving.graphs import graphs_of
from case_fast.serving.lines import KINDS, Line, items_of, lines_of, spreads, weighed, words_of
from case_fast.serving.reasons import Attention, Change, Explanation, Moved, Reply

MOST = 128  # leave-one-outs that are scored by one batch


@dataclass
class Version:
    """A dialogue as the model is to read it.

    Attributes:
        turns: what was said. example: the same as features. gate: what an edit sets the gate to.
        number: of the dialogue in its list, which a sampled reply depends on.
        why, said: what the model makes of it. words: the reply that is explained.
    """

    turns: Sequence[Turn]
    example: Example
    number: int = 0
    gate: float | None = None
    why: Why = field(default_factory=Why)
    said: Generated | None = None
    words: tuple[int, ...] = ()
    log_p: float = math.nan

    def with_reply(self, words: Sequence[int]) -> Example:
        return replace(self.example, response=np.array(words, dtype=np.int32))


@dataclass
class Task:
    """What is to be explained: a dialogue as it was said, and as edits leave it, which is the same one without any."""

    before: Version
    after: Version
    edits: tuple[Mapping[str, Any], ...] = ()
    given: str | None = None


class Explainer:
    """Answers and explains examples, all of whose texts are in one table.

    Args:
        texts: of the examples.
    """

    def __init__(self, model: DialogueModel, featurizer: Featurizer, texts: TextTable, config: GenerationConfig):
        self.model, self.featurizer, self.texts, self.config = model, featurizer, texts, config
        self.vocabulary = featurizer.vocabulary

    # ---- what the model makes of it

    def answer(self, versions: Sequence[Version]) -> Reading:
        """Let the model reply, by one batch; fills in ``why`` and ``said``."""
        batch = self._batch([version.example for version in versions])
        with evaluating(self.model):
            reading = self._read(batch, [version.gate for version in versions])
            whys = one_by_one(self.model.explain(batch, reading), batch.size)
        said = generate(self.model, batch, self.config, [version.number for version in versions], reading)
        for version, why, generated in zip(versions, whys, said, strict=True):
            version.why, version.said = why, generated
        return reading

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return make_batch(examples, self.texts, self.model.needs).to(next(self.model.parameters()).device)

    def _read(self, batch: Batch, gates: Sequence[float | None]) -> Reading:
        reading = self.model.read(batch)
        if any(gate is not None for gate in gates):
            own = self.model.explain(batch, reading).gate
            given = own.new_tensor([math.nan if gate is None else gate for gate in gates])
            reading = self.model.with_gate(batch, reading, torch.where(given.isnan(), own, given))
        return reading

    def reply(self, version: Version) -> Reply:
        """What was answered, with what the model weighed."""
        items = items_of(weighed(lines_of(version.example, self.texts, self.model.needs), version.why.choices))
        return Reply(**self._common(version, items), **self._said(version.said))

    def _said(self, said: Generated) -> dict[str, Any]:
        words = self.vocabulary.decode(said.words)
        return {"text": detokenize(words), "words": tuple(words), "score": said.score}

    def _common(self, version: Version, items: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """What a `Reply` has beside what was said."""
        example, why = version.example, version.why
        emotions: tuple[tuple[str, float], ...] = ()
        if why.emotion is not None:
            ranked = why.emotion.sort(descending=True, stable=True)
            emotions = tuple((EMOTIONS[at], p) for at, p in zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True))
        words = words_of(example, self.texts)
        return {
            "emotion": emotions[0][0] if emotions else None,
            "emotions": emotions,
            "sub_utterances": tuple(self.texts.text(text) for text in example.sub_utterance.tolist()),
            **{kind: items[kind] for kind in ("inferences", "reactions", "concepts")},
            "unknown_words": self._unknown(words),
            "truncated": example.truncated,
            "gate": None if why.gate is None else float(why.gate),
            "balance": self.model.balance,
        }

    def _unknown(self, words: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word for word in words if word not in self.vocabulary))

    # ---- why

    def explain(self, tasks: Sequence[Task], effects: Collection[str] = KINDS, attention: bool = False) -> list[Explanation]:
        """Explain the replies; see `Responder.explain`."""
        if unknown := [kind for kind in effects if kind not in KINDS]:
            raise ConfigError(f"there are no effects of {', '.join(unknown)}; there are those of {', '.join(KINDS)}")
        versions = list({id(version): version for task in tasks for version in (task.before, task.after)}.values())
        reading = self.answer(versions)
        for task in tasks:
            for version in (task.before, task.after):
                given = None if task.given is None else self.vocabulary.encode(tokenize(task.given))
                version.words = version.said.words if given is None else tuple(given)
        batch = self._batch([version.with_reply(version.words) for version in versions])
        with evaluating(self.model):
            whys = one_by_one(self.model.explain(batch, reading, posterior=True), batch.size)
            scores = log_p(self.model, batch, reading)
        for version, why, score in zip(versions, whys, scores, strict=True):
            version.why, version.log_p = why, score
        place = {id(version): place for place, version in enumerate(versions)}
        lines = {id(version): lines_of(version.example, self.texts, self.model.needs) for version in versions}
        left_out, old = self._effects(tasks, lines, effects)
        found = []
        for task, effect, old_log_p in zip(tasks, left_out, old, strict=True):
            at = place[id(task.after)]
            looks = self._attention(batch, reading, at, task.after, lines[id(task.after)]) if attention else ()
            found.append(self._explanation(task, lines, effect, old_log_p, looks))
        return found

    def _effects(self, tasks: Sequence[Task], lines: Mapping[int, Sequence[Line]], kinds: Collection[str]
                 ) -> tuple[list[dict[int, float]], list[float]]:
        """Of each task the effects of its lines of these kinds by their places, all leave-one-outs together, and log P of the old
        reply now."""
        asked: list[tuple[int, int | None, Example, float | None]] = []  # task, line or None, what is scored, its gate
        for number, task in enumerate(tasks):
            example = task.after.with_reply(task.after.words)
            for place, line in enumerate(lines[id(task.after)]):
                if line.rows and line.kind in kinds:
                    asked.append((number, place, line.without(example), task.after.gate))
            if task.edits and task.before.words != task.after.words:
                asked.append((number, None, task.after.with_reply(task.before.words), task.after.gate))
        found: list[dict[int, float]] = [{} for _ in tasks]
        old = [task.after.log_p for task in tasks]
        scores = self._scores([(example, gate) for *_, example, gate in asked])
        for (number, place, *_), score in zip(asked, scores, strict=True):
            if place is None:
                old[number] = score
            else:
                found[number][place] = tasks[number].after.log_p - score
        return found, old

    def _scores(self, asked: Sequence[tuple[Example, float | None]]) -> Iterator[float]:
        for start in range(0, len(asked), MOST):
            examples, gates = zip(*asked[start : start + MOST], strict=True)
            batch = self._batch(examples)
            with evaluating(self.model):
                scores = log_p(self.model, batch, self._read(batch, gates))
            yield from scores

    def _explanation(self, task: Task, lines: Mapping[int, Sequence[Line]], effects: Mapping[int, float], old_log_p: float,
                     attention: tuple[Attention, ...]) -> Explanation:
        version = task.after
        own = weighed(lines[id(version)], version.why.choices, effects)
        items = items_of(own)
        common = self._common(version, items)
        said = self._said(version.said)
        if task.given is not None:
            said = {"text": task.given, "words": tuple(tokenize(task.given)), "score": None}
        return Explanation(
            **common, **said,
            model=self.model.config.kind,
            turns=tuple(version.turns),
            edits=tuple(dict(edit) for edit in task.edits),
            given=task.given is not None,
            unknown_in_reply=self._unknown(said["words"]),
            log_p=version.log_p,
            perplexity=math.exp(-version.log_p / (len(version.words) + 1)),
            context=items["context"],
            spreads=spreads(version.why.choices, items),
            graphs=graphs_of(version.example, own, common["sub_utterances"], version.why.choices, lines[id(task.before)],
                             self.model.needs),
            attention=attention,
            change=self._change(task, lines, old_log_p) if task.edits else None,
        )

    # ---- the words' attention

    def _attention(self, batch: Batch, reading: Reading, at: int, version: Version, lines: Sequence[Line]
                   ) -> tuple[Attention, ...]:
        """Of the dialogue at ``at``. What are several vertices of one line is one row."""
        start, end = batch.cu_target[at : at + 2].tolist()
        with evaluating(self.model):
            weights = self.model.source_attention(batch.decoder_input[start:end], reading.repeat(at, 1))
        words = tuple(self.vocabulary.decode([*version.words, EOS]))
        of_kind = {kind: [line for line in lines if line.kind == kind] for kind in ("inferences", "concepts", "context")}
        found = []
        for names, shares in zip(self.model.sources, weights, strict=True):
            rows: list[tuple[str, tuple[int, ...]]] = []
            for name in names:
                rows += self._rows(name, len(rows), of_kind, batch, at)
            merged = torch.stack([shares[:, list(places)].sum(1) for _, places in rows], 1) if rows else shares[:, :0]
            found.append(Attention(", ".join(names), tuple(label for label, _ in rows), words,
                                   tuple(map(tuple, merged.tolist()))))
        return tuple(found)

    def _rows(self, name: str, first: int, of_kind: Mapping[str, Sequence[Line]], batch: Batch, at: int
              ) -> list[tuple[str, tuple[int, ...]]]:
        """Labels and places of the rows of a part of a memory, the part's first row at ``first``."""
        if name == "emotional":
            start, end = batch.emotional.cu[at : at + 2].tolist()
            labels = self.vocabulary.decode(batch.emotional.word[start:end].tolist())
            return [(label.replace(SPECIALS[SEP], "[SEP]"), (first + row,)) for row, label in enumerate(labels)]
        if name == "inferences":
            return [(line.label, tuple(first + row for row in line.rows)) for line in of_kind[name]]
        words = [line.label for line in of_kind["context"] if line.rows]
        labels = ["[CLS]", *words, *(line.label for line in of_kind["concepts"] if name == "concepts")]
        return [(label, (first + row,)) for row, label in enumerate(labels)]

    # ---- what edits changed

    def _change(self, task: Task, lines: Mapping[int, Sequence[Line]], old_log_p: float) -> Change:
        versions = (task.before, task.after)
        said = [self._said(version.said) for version in versions]
        matcher = SequenceMatcher(None, *[one["words"] for one in said], autojunk=False)
        emotions: list[tuple[str, float, float]] = []
        if task.after.why.emotion is not None:
            shares = [version.why.emotion.tolist() for version in versions]
            emotions = sorted(zip(EMOTIONS, *shares, strict=False), key=lambda row: -abs(row[2] - row[1]))
        gates = [version.why.gate for version in versions]
        return Change(
            before=said[0]["text"], after=said[1]["text"],
            words=tuple((op, said[0]["words"][a:b], said[1]["words"][c:d]) for op, a, b, c, d in matcher.get_opcodes()),
            emotions=tuple(emotions),
            gate=None if gates[0] is None else (float(gates[0]), float(gates[1])),
            weights=_moved([items_of(weighed(lines[id(version)], version.why.choices)) for version in versions]),
            log_p=(task.before.log_p, old_log_p),
        )


def _moved(items: Sequence[Mapping[str, Sequence[Any]]]) -> tuple[Moved, ...]:
    """The weights of knowledge before and after, the largest change first."""
    found = []
    for kind in ("inferences", "concepts"):
        before, after = ({(getattr(item, "relation", None), item.text): item.prior for item in of[kind]} for of in items)
        found += [Moved(kind, *key, before.get(key), after.get(key)) for key in {**before, **after}]
    weighed_ = [row for row in found if row.before is not None or row.after is not None]
    return tuple(sorted(weighed_, key=lambda row: -abs((row.after or 0.0) - (row.before or 0.0))))


def one_by_one(why: Why, size: int) -> list[Why]:
    """The reasons of each of the ``size`` dialogues of a batch."""

    def parted(x: Tensor | None) -> list[Tensor | None]:
        return [None] * size if x is None else list(x.unbind())

    def split(x: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
        return [None] * size if x is None else list(x.split(sizes))

    choices: list[dict[str, Choice]] = [{} for _ in range(size)]
    for name, choice in why.choices.items():
        sizes = torch.bincount(choice.dialogue, minlength=size).tolist()
        columns = (split(x, sizes) for x in (choice.prior, choice.dialogue, choice.posterior))
        for found, parts in zip(choices, zip(*columns, strict=True), strict=True):
            found[name] = Choice(prior=parts[0], dialogue=parts[1], posterior=parts[2])
    return [Why(emotion=emotion, choices=found, gate=gate)
            for emotion, found, gate in zip(parted(why.emotion), choices, parted(why.gate), strict=True)]


def log_p(model: DialogueModel, batch: Batch, reading: Reading) -> list[float]:
    """Log-probability of the words and the end of each of the batch's replies, in nats."""
    nll = model.reply_nll(batch.decoder_input, batch.cu_target, reading, batch.target).double()
    return (-nll.new_zeros(batch.size).index_add_(0, batch.target_segment, nll)).tolist()
