"""Packing examples into a `Batch`: one packer a part, each by arithmetic on whole arrays.

Examples made from raw text and rows of a store come in by the same door: as the ragged arrays of their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from case_fast.arguments import whole
from case_fast.batch import PARTS, Batch, CasePart, ConceptPart, EmotionalPart, FeedbackPart, Graphs, RelationsPart
from case_fast.data.featurizer import EmotionWords, Example
from case_fast.data.ragged import Beside, Ragged, offsets_of, spans
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, SEP, SPEAKER, Vocabulary
from case_fast.errors import ConfigError
from case_fast.knowledge.source import COGNITION_RELATIONS

Read = Callable[[str], Ragged]
"""A field of the examples of a batch (`Example.column`), a row an example."""


class Texts(Protocol):
    """A table of knowledge texts; `TextTable` and a store's own table are two. ``emotional``: asked for by those parts alone that
    are about emotional words."""

    vocabulary: Vocabulary
    emotional: EmotionWords | None

    def rows(self, ids: np.ndarray) -> Ragged: ...


def make_batch(examples: Sequence[Example], texts: Texts, parts: Iterable[str] = PARTS, seed: int = 0) -> Batch:
    """Pack examples whose text ids point into ``texts``.

    Args:
        parts: of the batch, of `PARTS`; "dialogue" is always made.
        seed: the number in `Batch.seed`.

    Raises:
        ValueError: no examples.
        ConfigError: a part that does not exist, or that the examples or texts have nothing for.
    """
    emotion = np.array([e.emotion for e in examples], dtype=np.int64)
    return pack(lambda name: Ragged.of([e.column(name) for e in examples]), emotion, texts, parts, seed)


def pack(read: Read, emotion: np.ndarray, texts: Texts, parts: Iterable[str], seed: int) -> Batch:
    """The batch of the examples that ``read`` reads and whose labels are ``emotion`` (B,); the rest as `make_batch`."""
    if not len(emotion):
        raise ValueError("a batch needs at least one example")
    parts = list(parts)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"a batch has no part {', '.join(unknown)}; it has {', '.join(PARTS)}")
    size, context, response = len(emotion), read("context"), read("response")
    heard, said = Beside(1, context.sizes), Beside(1, response.sizes)
    words = int(said.offsets[-1])
    case = _pack_case(read, texts, heard, said) if "case" in parts else None
    concept = _pack_concept(read, context) if "concept" in parts else None
    relations = _pack_relations(read, texts) if "relations" in parts else None
    emotional = _pack_emotional(read, context, _emotion_words(texts)) if "emotional" in parts else None
    feedback = _pack_feedback(read("feedback"), response, said, _emotion_words(texts)) if "feedback" in parts else None
    context_position, target_position = positions = [_positions(heard.offsets), _positions(said.offsets)]
    positions += [] if case is None else [case.response_position, case.text_position, case.reaction_position]
    positions += [] if concept is None else [concept.position]
    positions += [] if relations is None else [relations.cognition_position, relations.reaction_position]
    positions += [] if emotional is None else [emotional.position]
    return Batch(
        size=size,
        longest=1 + max(int(position.max()) for position in positions if position.numel()),
        seed=torch.tensor(whole("seed", seed)),
        sizes=_tensor(np.array([size, words])),
        context=_tensor(heard(CLS, context.values)),
        context_role=_tensor(heard(SPEAKER, read("context_role").values)),
        context_position=context_position,
        context_segment=_segments(heard.sizes),
        cu_context=_tensor(heard.offsets),
        decoder_input=_tensor(said(BOS, response.values)),
        target=_tensor(Beside(response.sizes, 1)(response.values, EOS)),
        target_position=target_position,
        target_segment=_segments(said.sizes),
        cu_target=_tensor(said.offsets),
        emotion=_tensor(emotion),
        dialogue_weight=torch.from_numpy(np.full(size, 1 / size)),
        target_weight=torch.from_numpy(np.full(words, 1 / words)),
        bow_weight=torch.from_numpy(np.repeat(1 / (size * said.sizes), said.sizes)),
        case=case,
        concept=concept,
        relations=relations,
        emotional=emotional,
        feedback=feedback,
    )


def _pack_case(read: Read, texts: Texts, heard: Beside, said: Beside) -> CasePart:
    """``heard``, ``said``: a token and the context, a token and the reply."""
    subs, knowledge = read("sub_utterance"), read("knowledge")
    vertices = Beside(subs.sizes, knowledge.sizes)
    dialogue, sub_dialogue = (np.arange(len(subs)).repeat(rows.sizes) for rows in (knowledge, subs))

    of_vertex = vertices(subs.values, knowledge.values)
    first, vertex_text = _distinct(of_vertex)
    words = texts.rows(of_vertex[first])
    rows = Beside(1, words.sizes)
    text, position = rows(CLS, words.values), spans(0, rows.offsets)
    pair, text_distinct = _distinct(text * (1 + position.max()) + position)

    # Sub-utterances of equal text share one row, so that none is a negative of itself (docs/paper.md, L_fine).
    first, same = _distinct(sub_dialogue * (1 + subs.values.max()) + subs.values)
    is_first = np.zeros(len(sub_dialogue), dtype=bool)
    is_first[first] = True
    sub_row = (is_first.cumsum() - 1)[first[same]]
    reaction_dialogue = sub_dialogue[is_first]

    reaction, reaction_sub = read("reaction"), read("reaction_sub")
    sub = reaction_sub.values + subs.offsets[:-1].repeat(reaction_sub.sizes)
    kept = np.flatnonzero(is_first[sub])
    kept = kept[np.argsort(sub[kept], kind="stable")]
    felt = texts.rows(reaction.values[kept])
    cu_reaction = felt.offsets[np.searchsorted(sub_row[sub[kept]], np.arange(len(reaction_dialogue) + 1))]
    reaction_sizes, fused = np.diff(cu_reaction), heard.sizes[reaction_dialogue]
    cu_fused = offsets_of(fused)

    knowledge_reaction = sub_row[read("knowledge_sub").values + subs.offsets[dialogue]]
    known, with_reaction = np.flatnonzero(knowledge.sizes), np.flatnonzero(reaction_sizes)
    paired = np.flatnonzero(reaction_sizes[knowledge_reaction])
    positive = np.searchsorted(with_reaction, knowledge_reaction[paired])

    return CasePart(
        response=_tensor(said(CLS, read("response").values)),
        response_role=_tensor(said(LISTENER, LISTENER)),
        response_position=_positions(said.offsets),
        cu_response=_tensor(said.offsets.copy()),
        text=_tensor(text),
        text_position=_tensor(position),
        cu_text=_tensor(rows.offsets),
        distinct_word=_tensor(text[pair]),
        distinct_position=_tensor(position[pair]),
        text_distinct=_tensor(text_distinct),
        cognition=_graphs(read, "cognition"),
        cognition_text=_tensor(vertex_text),
        knowledge=_tensor(spans(vertices.offsets[:-1] + subs.sizes, knowledge.offsets)),
        cu_knowledge=_tensor(knowledge.offsets),
        knowledge_dialogue=_tensor(dialogue),
        knowledge_reaction=_tensor(knowledge_reaction),
        reaction=_tensor(felt.values),
        reaction_position=_positions(cu_reaction),
        reaction_segment=_segments(reaction_sizes),
        cu_reaction=_tensor(cu_reaction),
        reaction_dialogue=_tensor(reaction_dialogue),
        reaction_first=_tensor(sub_row[subs.offsets[:-1]]),
        reaction_context=_tensor(spans(heard.offsets[reaction_dialogue], cu_fused)),
        reaction_context_segment=_segments(fused),
        cu_reaction_context=_tensor(cu_fused),
        known=_tensor(known),
        with_reaction=_tensor(with_reaction),
        paired=_tensor(paired),
        positive=_tensor(positive),
        negatives_affection=_tensor(np.full(len(paired), max(len(with_reaction) - 1, 0))),
        negatives_cognition=_tensor(len(paired) - np.bincount(positive, minlength=1)[positive]),
        coarse_sizes=_tensor(np.array([len(known), len(known)])),
        fine_sizes=_tensor(np.array([len(paired), len(with_reaction)])),
    )


def _pack_concept(read: Read, context: Ragged) -> ConceptPart:
    concept = read("concept")
    vertices = Beside(1, context.sizes, concept.sizes)
    intensity = vertices(0.0, read("context_intensity").values, read("concept_intensity").values, dtype=np.float32)
    return ConceptPart(
        graph=_graphs(read, "concept"),
        word=_tensor(vertices(CLS, context.values, concept.values)),
        position=_tensor(vertices(0, spans(1, context.offsets), read("concept_position").values)),
        type=_tensor(vertices(0, 0, 1)),
        intensity=torch.from_numpy(intensity),
    )


def _pack_relations(read: Read, texts: Texts) -> RelationsPart:
    knowledge, reaction = read("knowledge"), read("reaction")
    size, kinds = len(knowledge), len(COGNITION_RELATIONS)
    dialogue, felt_by = (np.arange(size).repeat(rows.sizes) for rows in (knowledge, reaction))
    of_all = np.flatnonzero(read("knowledge_sub").values == 0)  # of the whole utterance
    sequence = kinds * dialogue[of_all] + read("knowledge_relation").values[of_all]
    known = _strung(texts, knowledge.values[of_all], sequence, kinds * size)
    of_all = np.flatnonzero(read("reaction_sub").values == 0)
    felt = _strung(texts, reaction.values[of_all], felt_by[of_all], size)
    rows = Beside(1, known.sizes)
    return RelationsPart(
        cognition=_tensor(rows(CLS, known.values)),
        cognition_position=_positions(rows.offsets),
        cu_cognition=_tensor(rows.offsets),
        reaction=_tensor(felt.values),
        reaction_position=_positions(felt.offsets),
        reaction_segment=_segments(felt.sizes),
        cu_reaction=_tensor(felt.offsets),
    )


def _strung(texts: Texts, ids: np.ndarray, sequence: np.ndarray, count: int) -> Ragged:
    """The words of these texts end to end, by the sequence that each text belongs to; "to" and "none" left out."""
    order = np.argsort(sequence, kind="stable")
    words = texts.rows(ids[order])
    said = ~np.isin(words.values, [texts.vocabulary.ids[word] for word in ("to", "none") if word in texts.vocabulary.ids])
    sizes = np.bincount(sequence[order].repeat(words.sizes)[said], minlength=count)
    return Ragged(words.values[said], offsets_of(sizes))


def _emotion_words(texts: Texts) -> EmotionWords:
    if texts.emotional is None:
        raise ConfigError("the table of texts does not know which words are emotional; make it with featurizer.text_table()")
    return texts.emotional


def _pack_emotional(read: Read, context: Ragged, emotion_words: EmotionWords) -> EmotionalPart:
    chosen = emotion_words.of_context(context.values, read("context_intensity").values)
    dialogue = np.arange(len(context)).repeat(context.sizes)
    rows = Beside(1, np.bincount(dialogue[chosen], minlength=len(context)))
    return EmotionalPart(
        word=_tensor(rows(SEP, context.values[chosen])), position=_positions(rows.offsets), segment=_segments(rows.sizes),
        cu=_tensor(rows.offsets),
    )


def _pack_feedback(feedback: Ragged, response: Ragged, said: Beside, emotion_words: EmotionWords) -> FeedbackPart:
    """``said``: the words of the replies and EOS."""
    judged = np.flatnonzero(feedback.sizes)
    rows, words, emotional = feedback.take(judged), response.take(judged), emotion_words.known
    cu_reply = offsets_of(said.sizes[judged])
    felt, answered = emotional[rows.values], emotional[words.values]
    return FeedbackPart(
        dialogue=_tensor(judged),
        weight=torch.from_numpy(np.full(len(judged), 1 / max(len(judged), 1))),
        word=_tensor(rows.values),
        cu=_tensor(rows.offsets),
        emotional=_tensor(rows.values[felt]),
        cu_emotional=_tensor(_offsets_of_chosen(rows, felt)),
        reply=_tensor(spans(said.offsets[judged], cu_reply)),
        reply_segment=_segments(said.sizes[judged]),
        cu_reply=_tensor(cu_reply),
        reply_emotional=_tensor(spans(said.offsets[judged], words.offsets)[answered]),
        cu_reply_emotional=_tensor(_offsets_of_chosen(words, answered)),
        lexicon=torch.from_numpy(emotional.copy()),
    )


def _offsets_of_chosen(rows: Ragged, chosen: np.ndarray) -> np.ndarray:
    """(n + 1,) offsets of what is chosen, (values,) bool, of each row."""
    return np.concatenate([np.zeros(1, dtype=np.int64), chosen.cumsum()])[rows.offsets]


def _graphs(read: Read, name: str) -> Graphs:
    """The graphs of that name, local to their examples, as one block-diagonal CSR."""
    degree, neighbour = read(f"{name}_degree"), read(f"{name}_indices")
    first_vertex = degree.offsets[:-1].repeat(neighbour.sizes)
    return Graphs(
        indptr=torch.from_numpy(offsets_of(degree.values).astype(np.int32)),
        indices=torch.from_numpy((neighbour.values + first_vertex).astype(np.int32)),
        relation=torch.from_numpy(read(f"{name}_relation").values.astype(np.int32)),
        cu_vertices=_tensor(degree.offsets),
        dialogue=_segments(degree.sizes),
    )


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of n keys, from 0 to 2^63 / 2n: (d,) where each distinct one comes first, by rising key, and (n,) the place of each key
    among them. As `np.unique`, but sorts numbers, key and place in one: several times as fast as sorting places by keys."""
    bits = len(keys).bit_length()
    ordered = np.sort(keys << bits | np.arange(len(keys)))
    order = ordered & ((1 << bits) - 1)
    ordered >>= bits
    new = np.ones(len(keys), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    place = np.empty(len(keys), dtype=np.int64)
    place[order] = new.cumsum() - 1
    return order[new], place


def _segments(sizes: np.ndarray) -> Tensor:
    """The sequence that each row belongs to."""
    return _tensor(np.arange(len(sizes)).repeat(sizes))


def _positions(offsets: np.ndarray) -> Tensor:
    """The place of each row in its sequence."""
    return _tensor(spans(0, offsets))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64, copy=False))
