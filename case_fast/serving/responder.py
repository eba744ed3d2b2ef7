"""Talking to a trained run: raw text in; out come the reply, and what the model took into account for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from case_fast.data import Store
from case_fast.data.empathetic_dialogues import Turn
from case_fast.data.featurizer import Example, Featurizer, TextTable, prompts
from case_fast.data.text import normalize_space
from case_fast.errors import ConfigError, DataError
from case_fast.generation import GenerationConfig
from case_fast.knowledge import RELATIONS, CachedSource, InferenceCache, KnowledgeSource, open_source
from case_fast.models import DialogueModel
from case_fast.runs import Run, load_features, load_model
from case_fast.serving.edits import Edit, edited, edited_turns, read_edits
from case_fast.serving.explain import Explainer, Task, Version
from case_fast.serving.lines import KINDS, reads_inferences
from case_fast.serving.reasons import Explanation, Reply

_log = logging.getLogger("case_fast")


@dataclass(frozen=True)
class Asked:
    """What is to be explained; see `Responder.explain`."""

    history: Sequence[str] | str
    edits: Sequence[Mapping[str, Any]] = ()
    reply: str | None = None


class Responder:
    """Answers raw texts with a model.

    Args:
        open_knowledge: opens the source of inferences; called when the first answer needs it.
    """

    def __init__(self, model: DialogueModel, featurizer: Featurizer, open_knowledge: Callable[[], KnowledgeSource]):
        self.model, self.featurizer, self._open_knowledge = model.eval(), featurizer, open_knowledge

    @cached_property
    def knowledge(self) -> KnowledgeSource:
        return self._open_knowledge()

    def respond(self, history: Sequence[str] | str, config: GenerationConfig | None = None) -> Reply:
        """The reply to a dialogue: its texts, oldest first, speaker and listener in turn, the speaker first and last.

        Raises:
            ConfigError: the history is empty, holds a blank text, or does not end with the speaker's.
            DataError: the source of knowledge cannot be opened.
        """
        return self.respond_many([history], config)[0]

    def respond_many(self, histories: Sequence[Sequence[str] | str], config: GenerationConfig | None = None,
                     batch_size: int = 16) -> list[Reply]:
        """Replies to many dialogues, in order; see `respond`. A sample depends on the dialogue's place in the list."""
        if isinstance(histories, str):
            raise ConfigError("histories must be a list of dialogues; one text alone goes to respond()")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        dialogues = [_turns(history) for history in histories]
        config = config or GenerationConfig(min_words=1)
        replies: list[Reply] = []
        for start in range(0, len(dialogues), batch_size):
            replies += self._respond(dialogues[start : start + batch_size], config, start)
        return replies

    def _respond(self, dialogues: list[list[Turn]], config: GenerationConfig, first_index: int) -> list[Reply]:
        texts = self.featurizer.text_table()
        versions = [Version(turns, example, first_index + place)
                    for place, (turns, example) in enumerate(zip(dialogues, self._examples(dialogues, texts), strict=True))]
        explainer = self._explainer(texts, config)
        explainer.answer(versions)
        return [explainer.reply(version) for version in versions]

    def _explainer(self, texts: TextTable, config: GenerationConfig | None) -> Explainer:
        return Explainer(self.model, self.featurizer, texts, config or GenerationConfig(min_words=1))

    def _examples(self, dialogues: Sequence[Sequence[Turn]], texts: TextTable) -> list[Example]:
        """The features of dialogues, whatever is inferred from them by one call."""
        inferences: dict[str, dict[str, list[str]]] = {}
        if reads_inferences(self.model.needs):  # what no one reads is not inferred
            asked = list(dict.fromkeys(text for turns in dialogues for text in prompts(turns)))
            answers = self.knowledge.infer(asked, RELATIONS, self.featurizer.settings.inferences_per_relation)
            inferences = dict(zip(asked, answers, strict=True))
        return [self.featurizer.example(turns, inferences, texts) for turns in dialogues]

    # ---- why, and what if

    def explain(self, history: Sequence[str] | str, edits: Sequence[Mapping[str, Any]] = (), reply: str | None = None,
                config: GenerationConfig | None = None, effects: Collection[str] = KINDS, attention: bool = False) -> Explanation:
        """Why the model replies so to a dialogue, or what it makes of a reply that is given.

        Args:
            history: as of `respond`.
            edits: what if: turns first, then the rest in order; docs/explain.md has what an edit may say.
            reply: explained in place of the model's own.
            effects: of which kinds of things (inferences, reactions, concepts, context) the reply is scored without each;
                most of the work.
            attention: of each word of the reply to the decoder's sources.

        Raises:
            ConfigError: as `respond`, or the reply is blank, or there are no such things. EditError: an edit cannot be carried
                out; it is named.
        """
        return self.explain_many([Asked(history, edits, reply)], config, effects, attention)[0]

    def explain_many(self, asked: Sequence[Asked], config: GenerationConfig | None = None, effects: Collection[str] = KINDS,
                     attention: bool = False) -> list[Explanation]:
        """Explain many at once; an explanation is the same alone, but that a sampled reply depends on the place in the list."""
        texts, tasks = self.featurizer.text_table(), []
        turns = [_turns(one.history) for one in asked]
        edits = [read_edits(one.edits) for one in asked]
        examples = self._examples(turns, texts)
        for number, (one, said, own, example) in enumerate(zip(asked, turns, edits, examples, strict=True)):
            tasks.append(self._task(Version(said, example, number), own, one, texts))
        return self._explainer(texts, config).explain(tasks, effects, attention)

    def explain_stored(self, store: Store, split: str, indices: Sequence[int], edits: Sequence[Mapping[str, Any]] = (),
                       reply: str | None = None, reference: bool = False, config: GenerationConfig | None = None,
                       effects: Collection[str] = KINDS, attention: bool = False) -> list[Explanation]:
        """Explain the model's replies to examples of a store, with the knowledge that the store has of them.

        Args:
            reference: explain the replies that people gave, in place of the model's own or of ``reply``.
            Others: as of `explain`; a sampled reply depends on the example's index.

        Raises:
            ConfigError: the store's vocabulary is not the run's, or there is no such example. EditError: as `explain`.
        """
        if store.featurizer.vocabulary.words != self.featurizer.vocabulary.words:
            raise ConfigError(f"{store.path} has another vocabulary than the run: give the store that it was trained on")
        if split not in store.splits:
            raise ConfigError(f"split {split!r} is not in this store; it has {', '.join(store.splits)}")
        if outside := [index for index in indices if not 0 <= index < store.size(split)]:
            raise ConfigError(f"index {outside[0]} is outside 0 .. {store.size(split) - 1} of the split {split!r}")
        texts, tasks, own = self.featurizer.text_table(), [], read_edits(edits)
        for index in indices:
            example = _with_own_texts(store.example(split, index), store, texts)
            turns = [Turn(*said) for said in zip(example.source["context"], example.source["by_speaker"], strict=True)]
            asked = Asked((), edits, example.source["response"] if reference else reply)
            tasks.append(self._task(Version(turns, example, index), own, asked, texts))
        return self._explainer(texts, config).explain(tasks, effects, attention)

    def _task(self, before: Version, edits: Sequence[Edit], asked: Asked, texts: TextTable) -> Task:
        if asked.reply is not None and not normalize_space(asked.reply):
            raise ConfigError("the reply to be explained is blank")
        if not edits:
            return Task(before, before, given=asked.reply)
        turns = edited_turns(before.turns, edits)
        (example,) = self._examples([turns], texts) if turns != before.turns else [before.example]
        example, gate = edited(example, texts, edits, self.model, self.featurizer)
        return Task(before, Version(turns, example, before.number, gate), tuple(asked.edits), asked.reply)


def _with_own_texts(example: Example, store: Store, texts: TextTable) -> Example:
    """The example of a store with the texts of its knowledge in another table."""
    return replace(example, **{
        name: np.array([texts.add(store.texts.text(index)) for index in getattr(example, name).tolist()], dtype=np.int32)
        for name in ("sub_utterance", "knowledge", "reaction")})


def _turns(history: Sequence[str] | str) -> list[Turn]:
    texts = [history] if isinstance(history, str) else history
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ConfigError("history must be a text or a list of texts, oldest first")
    if not texts:
        raise ConfigError("history is empty; give at least the speaker's first text")
    turns = []
    for place, text in enumerate(texts):
        text = normalize_space(text.encode("utf-8", "replace").decode())  # half surrogate pairs have no UTF-8
        if not text:
            raise ConfigError(f"text {place + 1} of the history is blank; every turn needs words")
        turns.append(Turn(text, by_speaker=place % 2 == 0))
    if len(turns) % 2 == 0:
        raise ConfigError(
            f"history holds {len(turns)} texts, so it ends with the listener; give an odd number, oldest first, speaker and "
            "listener in turn, so that the last one is the speaker's"
        )
    return turns


# ---- opening a run


def load(run: str | Path, device: str = "auto", knowledge: str | None = None, checkpoint: str = "best") -> Responder:
    """Open a run folder for talking; reads local files only, and the source of knowledge when it is first needed.

    Args:
        device: auto, cpu, cuda or cuda:N.
        knowledge: "bundled", "atomic:PATH" or "comet:DIR" in place of the source that the run's data was prepared with.
        checkpoint: "best", or the step of one of the run's checkpoints.

    Raises:
        CheckpointError: a part of the run is missing or damaged.
        ConfigError: an argument cannot be used.
    """
    model, chosen = load_model(run, device, checkpoint)
    featurizer, recorded = load_features(run, model.config.vocab_size)
    return Responder(model, featurizer, lambda: _open_knowledge(Run(run), recorded, knowledge, str(chosen)))


def _open_knowledge(run: Run, recorded: dict[str, Any], given: str | None, device: str) -> KnowledgeSource:
    """The source that was asked for or recorded, behind the cache if one was recorded."""
    spec, cache = recorded["spec"], recorded.get("cache")
    try:
        source = open_source(given or spec, device)
    except DataError as error:
        if given:
            raise
        remedy = f"The run was prepared with {spec}: give its place now with --knowledge, or use --knowledge bundled"
        raise DataError(error.path, error.problem, remedy) from error
    if cache is None:
        return source
    for path in (Path(cache), run.cache):
        if os.access(path.parent, os.W_OK) and (os.access(path, os.W_OK) if path.exists() else path == run.cache):
            return CachedSource(source, InferenceCache(path))
    return source
