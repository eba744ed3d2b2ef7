"""Packing examples into a `Batch`: one packer a part, each by arithmetic on whole arrays.

Examples made from raw text and rows of a store come in by the same door: as the ragged arrays of their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import PARTS, Batch, CasePart, ConceptPart, Graphs
from case_fast.data.featurizer import Example
from case_fast.data.ragged import Beside, Ragged, offsets_of, spans
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, SPEAKER
from case_fast.errors import ConfigError

Read = Callable[[str], Ragged]
"""A field of the examples of a batch (`Example.column`), a row an example."""


class Texts(Protocol):
    """A table of knowledge texts; `TextTable` and a store's own table are two."""

    def rows(self, ids: np.ndarray) -> Ragged: ...


def make_batch(examples: Sequence[Example], texts: Texts, parts: Iterable[str] = PARTS, seed: int = 0) -> Batch:
    """Pack examples whose text ids point into ``texts``.

    Args:
        parts: of the batch, of `PARTS`; "dialogue" is always made.
        seed: the number in `Batch.seed`.

    Raises:
        ValueError: no examples; ConfigError: a part that does not exist.
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
    context, response = read("context"), read("response")
    heard, said = Beside(1, context.sizes), Beside(1, response.sizes)
    return Batch(
        size=len(emotion),
        seed=torch.tensor(seed),
        context=_tensor(heard(CLS, context.values)),
        context_role=_tensor(heard(SPEAKER, read("context_role").values)),
        cu_context=_tensor(heard.offsets),
        decoder_input=_tensor(said(BOS, response.values)),
        target=_tensor(Beside(response.sizes, 1)(response.values, EOS)),
        cu_target=_tensor(said.offsets),
        emotion=_tensor(emotion),
        case=_pack_case(read, texts, heard.offsets, response) if "case" in parts else None,
        concept=_pack_concept(read, context) if "concept" in parts else None,
    )


def _pack_case(read: Read, texts: Texts, cu_context: np.ndarray, response: Ragged) -> CasePart:
    said = Beside(1, response.sizes)
    subs, knowledge = read("sub_utterance"), read("knowledge")
    dialogues = np.arange(len(subs))
    vertices = Beside(subs.sizes, knowledge.sizes)
    knowledge_dialogue = np.repeat(dialogues, knowledge.sizes)

    distinct, vertex_text = np.unique(vertices(subs.values, knowledge.values), return_inverse=True)
    words = texts.rows(distinct)
    rows = Beside(1, words.sizes)
    text, position = rows(CLS, words.values), spans(0, rows.sizes)
    pairs, text_distinct = np.unique(text << 32 | position, return_inverse=True)

    # Sub-utterances of equal text share one row, so that none is a negative of itself (docs/paper.md, L_fine).
    sub_dialogue = np.repeat(dialogues, subs.sizes)
    _, first, same = np.unique(sub_dialogue << 32 | subs.values, return_index=True, return_inverse=True)
    is_first = np.zeros(len(sub_dialogue), dtype=bool)
    is_first[first] = True
    sub_row = (np.cumsum(is_first) - 1)[first[same]]
    reaction_dialogue = sub_dialogue[is_first]

    said_sub = read("reaction_sub")
    sub = said_sub.values + np.repeat(subs.offsets[:-1], said_sub.sizes)
    kept = np.flatnonzero(is_first[sub])
    kept = kept[np.argsort(sub[kept], kind="stable")]
    reactions = texts.rows(read("reaction").values[kept])
    cu_reaction = reactions.offsets[np.searchsorted(sub_row[sub[kept]], np.arange(len(reaction_dialogue) + 1))]

    knowledge_reaction = sub_row[read("knowledge_sub").values + subs.offsets[knowledge_dialogue]]
    has_reaction = cu_reaction[1:] > cu_reaction[:-1]
    with_reaction, paired = np.flatnonzero(has_reaction), np.flatnonzero(has_reaction[knowledge_reaction])
    positive = np.searchsorted(with_reaction, knowledge_reaction[paired])
    fused = (cu_context[1:] - cu_context[:-1])[reaction_dialogue]

    return CasePart(
        response=_tensor(said(CLS, response.values)),
        response_role=torch.full((int(said.offsets[-1]),), LISTENER),
        cu_response=_tensor(said.offsets),
        text=_tensor(text),
        cu_text=_tensor(rows.offsets),
        distinct_word=_tensor(pairs >> 32),
        distinct_position=_tensor(pairs & 0xFFFFFFFF),
        text_distinct=_tensor(text_distinct),
        cognition=_graphs(read, "cognition"),
        cognition_text=_tensor(vertex_text),
        knowledge=_tensor(spans(vertices.offsets[:-1] + subs.sizes, knowledge.sizes)),
        cu_knowledge=_tensor(knowledge.offsets),
        knowledge_dialogue=_tensor(knowledge_dialogue),
        knowledge_reaction=_tensor(knowledge_reaction),
        reaction=_tensor(reactions.values),
        cu_reaction=_tensor(cu_reaction),
        reaction_dialogue=_tensor(reaction_dialogue),
        reaction_first=_tensor(sub_row[subs.offsets[:-1]]),
        reaction_context=_tensor(spans(cu_context[reaction_dialogue], fused)),
        cu_reaction_context=_tensor(offsets_of(fused)),
        known=_tensor(np.flatnonzero(knowledge.sizes)),
        with_reaction=_tensor(with_reaction),
        paired=_tensor(paired),
        positive=_tensor(positive),
        negatives_affection=torch.full((len(paired),), max(len(with_reaction) - 1, 0)),
        negatives_cognition=_tensor(len(paired) - np.bincount(positive, minlength=1)[positive]),
    )


def _pack_concept(read: Read, context: Ragged) -> ConceptPart:
    concept = read("concept")
    vertices = Beside(1, context.sizes, concept.sizes)
    intensity = vertices(0.0, read("context_intensity").values, read("concept_intensity").values, dtype=np.float32)
    return ConceptPart(
        graph=_graphs(read, "concept"),
        word=_tensor(vertices(CLS, context.values, concept.values)),
        position=_tensor(vertices(0, spans(1, context.sizes), read("concept_position").values)),
        type=_tensor(vertices(0, 0, 1)),
        intensity=torch.from_numpy(intensity),
    )


def _graphs(read: Read, name: str) -> Graphs:
    """The graphs of that name, local to their examples, as one block-diagonal CSR."""
    degree, neighbour = read(f"{name}_degree"), read(f"{name}_indices")
    first_vertex = np.repeat(degree.offsets[:-1], neighbour.sizes)
    return Graphs(
        indptr=torch.from_numpy(offsets_of(degree.values).astype(np.int32)),
        indices=torch.from_numpy((neighbour.values + first_vertex).astype(np.int32)),
        relation=torch.from_numpy(read(f"{name}_relation").values.astype(np.int32)),
        cu_vertices=_tensor(degree.offsets),
        dialogue=_tensor(np.repeat(np.arange(len(degree)), degree.sizes)),
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
