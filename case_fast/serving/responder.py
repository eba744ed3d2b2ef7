"""Talking to a trained run: raw text in; out come the reply and what the model took into account for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from case_fast.batch import Batch
from case_fast.data.empathetic_dialogues import EMOTIONS, Turn
from case_fast.data.featurizer import Example, Featurizer, TextTable, prompts
from case_fast.data.pack import make_batch
from case_fast.data.text import detokenize, normalize_space, tokenize
from case_fast.data.vocabulary import Vocabulary
from case_fast.errors import ConfigError, DataError
from case_fast.generation import Generated, GenerationConfig, generate
from case_fast.knowledge import (
    COGNITION_RELATIONS,
    RELATIONS,
    CachedSource,
    InferenceCache,
    KnowledgeSource,
    open_source,
)
from case_fast.models import DialogueModel, Why
from case_fast.models.base import evaluating
from case_fast.runs import Run, load_features, load_model

_log = logging.getLogger("case_fast")
_SHOWN_EMOTIONS = 5


@dataclass(frozen=True)
class Inference:
    """A commonsense inference and its share of the model's prior attention over K_CS (Eq. 4)."""

    sub_utterance: str
    relation: str
    text: str
    weight: float


@dataclass(frozen=True)
class Reaction:
    sub_utterance: str
    text: str


@dataclass(frozen=True)
class Concept:
    """An emotional concept, the context words it belongs to, and its share of the prior over K_EC (Eq. 4).

    [CLS] and the context's words hold the rest of that prior.
    """

    word: str
    weight: float
    tokens: tuple[str, ...]
    intensity: float


@dataclass(frozen=True)
class Reply:
    """A reply and its reasons.

    Attributes:
        text: the reply; ``words`` before they were joined.
        emotion: the speaker's predicted emotion; ``emotions``: the most probable ones with their probabilities. None and empty
            where the model predicts none.
        inferences: by falling weight; the weights add up to 1 when there are any. Those, reactions and concepts are empty where
            the model reads no such thing.
        reactions: inferred reactions of the speaker. concepts: by falling weight.
        unknown_words: context words that the vocabulary lacks. truncated: how many context words were cut off at the front.
        gate: share of the concepts' side in the affection (mu of Eq. 15); None where the model has none.
        score: log-probability of the reply.
    """

    text: str
    words: tuple[str, ...]
    emotion: str | None
    emotions: tuple[tuple[str, float], ...]
    inferences: tuple[Inference, ...]
    reactions: tuple[Reaction, ...]
    concepts: tuple[Concept, ...]
    unknown_words: tuple[str, ...]
    truncated: int
    gate: float | None
    score: float

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


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
        inferences: dict[str, dict[str, list[str]]] = {}
        if "case" in self.model.needs:  # what no one reads is not inferred
            asked = list(dict.fromkeys(text for turns in dialogues for text in prompts(turns)))
            answers = self.knowledge.infer(asked, RELATIONS, self.featurizer.settings.inferences_per_relation)
            inferences = dict(zip(asked, answers, strict=True))
        texts = self.featurizer.text_table()
        examples = [self.featurizer.example(turns, inferences, texts) for turns in dialogues]
        batch = make_batch(examples, texts, self.model.needs).to(next(self.model.parameters()).device)
        with evaluating(self.model):
            reading = self.model.read(batch)
            whys = _one_by_one(self.model.explain(reading), batch)
        replies = generate(self.model, batch, config, first_index, reading)
        return [self._reply(*found, texts) for found in zip(examples, replies, whys, strict=True)]

    def _reply(self, example: Example, said: Generated, why: Why, texts: TextTable) -> Reply:
        """``why``: of this dialogue alone."""
        vocabulary = self.featurizer.vocabulary
        words = [word for text in example.source["context"] for word in tokenize(text)][example.truncated :]
        ranked: tuple[tuple[str, float], ...] = ()
        if why.emotion is not None:
            best = why.emotion.topk(min(_SHOWN_EMOTIONS, len(why.emotion)))
            ranked = tuple((EMOTIONS[index], p) for p, index in zip(best.values.tolist(), best.indices.tolist(), strict=True))
        inferences, reactions = _inferences(example, texts, why.knowledge) if why.knowledge is not None else ((), ())
        said_words = vocabulary.decode(said.words)
        return Reply(
            text=detokenize(said_words),
            words=tuple(said_words),
            emotion=ranked[0][0] if ranked else None,
            emotions=ranked,
            inferences=inferences,
            reactions=reactions,
            concepts=_concepts(example, vocabulary, words, why.concept) if why.concept is not None else (),
            unknown_words=tuple(dict.fromkeys(word for word in words if word not in vocabulary)),
            truncated=example.truncated,
            gate=None if why.gate is None else float(why.gate),
            score=said.score,
        )


def _one_by_one(why: Why, batch: Batch) -> list[Why]:
    """The reasons of each dialogue of a batch."""

    def parted(x: Tensor | None, cu: Tensor | None = None) -> list[Tensor | None]:
        if x is None:
            return [None] * batch.size
        return list(x.unbind()) if cu is None else list(x.split(cu.diff().tolist()))

    parts = (parted(why.emotion), parted(why.knowledge, batch.case and batch.case.cu_knowledge),
             parted(why.concept, batch.concept and batch.concept.graph.cu_vertices), parted(why.gate))
    return [Why(emotion=emotion, knowledge=knowledge, concept=concept, gate=gate)
            for emotion, knowledge, concept, gate in zip(*parts, strict=True)]


def _inferences(example: Example, texts: TextTable, knowledge: Tensor) -> tuple[tuple[Inference, ...], tuple[Reaction, ...]]:
    """``knowledge`` (k,): the weights of the example's inferences."""
    subs = [texts.text(index) for index in example.sub_utterance.tolist()]
    # Vertices of equal words count as one: u_0 and u_1 of a one-sentence utterance have the same inferences.
    weights: dict[tuple[str, str, str], float] = {}
    for text, sub, relation, weight in zip(
        example.knowledge.tolist(), example.knowledge_sub.tolist(), example.knowledge_relation.tolist(), knowledge.tolist(),
        strict=True,
    ):
        key = (subs[sub], COGNITION_RELATIONS[relation], texts.text(text))
        weights[key] = weights.get(key, 0.0) + weight
    reactions = dict.fromkeys(
        (subs[sub], texts.text(text)) for text, sub in zip(example.reaction.tolist(), example.reaction_sub.tolist(), strict=True)
    )
    return _by_weight(Inference(*key, weight) for key, weight in weights.items()), tuple(Reaction(*key) for key in reactions)


def _concepts(example: Example, vocabulary: Vocabulary, words: list[str], concept: Tensor) -> tuple[Concept, ...]:
    """``concept`` (V,): the weights of the example's vertices: [CLS], its words, its concepts."""
    found = zip(
        vocabulary.decode(example.concept.tolist()), concept.tolist()[1 + len(words) :], example.tokens_of_concepts(words),
        example.concept_intensity.tolist(), strict=True,
    )
    return _by_weight(Concept(word, weight, tokens, intensity) for word, weight, tokens, intensity in found)


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


def _by_weight(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(items, key=lambda item: -item.weight))


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
