"""Packing examples into a `Batch`: one packer a part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import PARTS, Batch, CasePart, ConceptPart, Graphs
from case_fast.data.featurizer import Example
from case_fast.data.graphs import CSR
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, SPEAKER
from case_fast.errors import ConfigError


class Texts(Protocol):
    """A table of knowledge texts; `TextTable` and a store's own table are two."""

    def tokens(self, index: int) -> np.ndarray: ...


def make_batch(examples: Sequence[Example], texts: Texts, parts: Iterable[str] = PARTS, seed: int = 0) -> Batch:
    """Pack examples whose text ids point into ``texts``.

    Args:
        parts: of the batch, of `PARTS`; "dialogue" is always made.
        seed: the number in `Batch.seed`.

    Raises:
        ValueError: no examples; ConfigError: a part that does not exist.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    parts = list(parts)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"a batch has no part {', '.join(unknown)}; it has {', '.join(PARTS)}")
    cls, bos, eos = (np.array([token], dtype=np.int32) for token in (CLS, BOS, EOS))
    cu_context = _cu_context(examples)
    target_sizes = np.array([1 + len(e.response) for e in examples])
    cu_target = _offsets(target_sizes)
    context_position, target_position = _positions(cu_context), _positions(cu_target)
    case = _pack_case(examples, texts) if "case" in parts else None
    concept = _pack_concept(examples) if "concept" in parts else None
    positions = [context_position, target_position]
    positions += [] if case is None else [case.response_position, case.text_position, case.reaction_position]
    positions += [] if concept is None else [concept.position]
    return Batch(
        size=len(examples),
        longest=1 + max(int(position.max()) for position in positions if position.numel()),
        seed=torch.tensor(seed),
        sizes=torch.tensor([len(examples), int(cu_target[-1])]),
        context=_long([part for e in examples for part in (cls, e.context)]),
        context_role=_long([part for e in examples for part in (np.array([SPEAKER]), e.context_role)]),
        context_position=context_position,
        context_segment=_segments(cu_context),
        cu_context=_tensor(cu_context),
        decoder_input=_long([part for e in examples for part in (bos, e.response)]),
        target=_long([part for e in examples for part in (e.response, eos)]),
        target_position=target_position,
        target_segment=_segments(cu_target),
        cu_target=_tensor(cu_target),
        emotion=torch.tensor([e.emotion for e in examples]),
        dialogue_weight=torch.full((len(examples),), 1 / len(examples), dtype=torch.float64),
        target_weight=torch.full((int(cu_target[-1]),), 1 / int(cu_target[-1]), dtype=torch.float64),
        bow_weight=torch.from_numpy(np.repeat(1 / (len(examples) * target_sizes), target_sizes)),
        case=case,
        concept=concept,
    )


def _cu_context(examples: Sequence[Example]) -> np.ndarray:
    return _offsets([1 + len(e.context) for e in examples])


def _pack_case(examples: Sequence[Example], texts: Texts) -> CasePart:
    dialogues, cu_context = np.arange(len(examples)), _cu_context(examples)
    used = [np.concatenate([e.sub_utterance, e.knowledge]) for e in examples]
    distinct, place = np.unique(np.concatenate(used), return_inverse=True)
    cls = np.array([CLS], dtype=np.int32)
    text_rows = [texts.tokens(index) for index in distinct.tolist()]
    text = np.concatenate([part for row in text_rows for part in (cls, row)])
    text_sizes = np.array([1 + len(row) for row in text_rows])
    cu_text = _offsets(text_sizes)
    text_position = _positions(cu_text)
    pairs, text_distinct = np.unique(text.astype(np.int64) << 32 | text_position.numpy(), return_inverse=True)

    sizes_cs = np.array([len(rows) for rows in used])
    subs = np.array([len(e.sub_utterance) for e in examples])
    first_vertex = _offsets(sizes_cs)
    knowledge_sizes = sizes_cs - subs

    reaction_rows: list[np.ndarray] = []
    reaction_dialogue: list[int] = []
    reaction_first: list[int] = []
    of_knowledge: list[np.ndarray] = []
    for dialogue, e in enumerate(examples):
        # Sub-utterances of equal text share one row, so that none is a negative of itself (docs/paper.md, L_fine).
        row_of: dict[int, int] = {}
        sub_row = []
        for sub, index in enumerate(e.sub_utterance.tolist()):
            if index not in row_of:
                row_of[index] = len(reaction_rows)
                words = [texts.tokens(int(found)) for found in e.reaction[e.reaction_sub == sub]]
                reaction_rows.append(np.concatenate(words) if words else np.zeros(0, dtype=np.int32))
                reaction_dialogue.append(dialogue)
            sub_row.append(row_of[index])
        reaction_first.append(sub_row[0])
        of_knowledge.append(np.array(sub_row)[e.knowledge_sub])
    reaction_sizes = np.array([len(row) for row in reaction_rows])
    cu_reaction = _offsets(reaction_sizes)
    fused = [np.arange(cu_context[d], cu_context[d + 1]) for d in reaction_dialogue]
    cu_fused = _offsets([len(row) for row in fused])
    cu_response = _offsets([1 + len(e.response) for e in examples])
    knowledge_reaction = np.concatenate(of_knowledge)
    (paired,) = (reaction_sizes[knowledge_reaction] > 0).nonzero()
    (with_reaction,) = (reaction_sizes > 0).nonzero()
    positive = np.searchsorted(with_reaction, knowledge_reaction[paired])
    known = knowledge_sizes.nonzero()[0]

    return CasePart(
        response=_long([part for e in examples for part in (cls, e.response)]),
        response_role=torch.full((int(cu_response[-1]),), LISTENER),
        response_position=_positions(cu_response),
        cu_response=_tensor(cu_response),
        text=_tensor(text),
        text_position=text_position,
        cu_text=_tensor(cu_text),
        distinct_word=_tensor(pairs >> 32),
        distinct_position=_tensor(pairs & 0xFFFFFFFF),
        text_distinct=_tensor(text_distinct.reshape(-1)),
        cognition=_graphs([e.cognition_graph for e in examples]),
        cognition_text=_tensor(place.reshape(-1)),
        knowledge=_long([first_vertex[d] + np.arange(subs[d], sizes_cs[d]) for d in dialogues]),
        cu_knowledge=_tensor(_offsets(knowledge_sizes)),
        knowledge_dialogue=_tensor(np.repeat(dialogues, knowledge_sizes)),
        knowledge_reaction=_tensor(knowledge_reaction),
        reaction=_long(reaction_rows),
        reaction_position=_positions(cu_reaction),
        reaction_segment=_segments(cu_reaction),
        cu_reaction=_tensor(cu_reaction),
        reaction_dialogue=torch.tensor(reaction_dialogue),
        reaction_first=torch.tensor(reaction_first),
        reaction_context=_long(fused),
        reaction_context_segment=_segments(cu_fused),
        cu_reaction_context=_tensor(cu_fused),
        known=_tensor(known),
        with_reaction=_tensor(with_reaction),
        paired=_tensor(paired),
        positive=_tensor(positive),
        negatives_affection=torch.full((len(paired),), max(len(with_reaction) - 1, 0)),
        negatives_cognition=_tensor(len(paired) - np.bincount(positive, minlength=1)[positive]),
        coarse_sizes=torch.tensor([len(known), len(known)]),
        fine_sizes=torch.tensor([len(paired), len(with_reaction)]),
    )


def _pack_concept(examples: Sequence[Example]) -> ConceptPart:
    kept = [1 + len(e.context) for e in examples]  # [CLS] and the words
    return ConceptPart(
        graph=_graphs([e.concept_graph for e in examples]),
        word=_long([part for e in examples for part in (np.array([CLS]), e.context, e.concept)]),
        position=_long([part for e, n in zip(examples, kept, strict=True) for part in (np.arange(n), e.concept_position)]),
        type=_long([part for e, n in zip(examples, kept, strict=True) for part in (np.zeros(n), np.ones(len(e.concept)))]),
        intensity=torch.from_numpy(np.concatenate(
            [part for e in examples for part in (np.zeros(1), e.context_intensity, e.concept_intensity)]
        ).astype(np.float32)),
    )


def _offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _segments(offsets: np.ndarray) -> Tensor:
    """The sequence that each row belongs to."""
    return _tensor(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))


def _positions(offsets: np.ndarray) -> Tensor:
    """The place of each row in its sequence."""
    return _tensor(np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets)))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _long(parts: list[np.ndarray]) -> Tensor:
    return _tensor(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)


def _graphs(graphs: Sequence[CSR]) -> Graphs:
    vertices = [len(graph.indptr) - 1 for graph in graphs]
    cu_vertices, cu_edges = _offsets(vertices), _offsets([len(graph.indices) for graph in graphs])
    start = [np.zeros(1, dtype=np.int64)]
    return Graphs(
        indptr=torch.from_numpy(
            np.concatenate(start + [g.indptr[1:] + cu_edges[i] for i, g in enumerate(graphs)]).astype(np.int32)
        ),
        indices=torch.from_numpy(
            np.concatenate([g.indices + cu_vertices[i] for i, g in enumerate(graphs)]).astype(np.int32)
        ),
        relation=torch.from_numpy(np.concatenate([g.relation for g in graphs]).astype(np.int32)),
        cu_vertices=_tensor(cu_vertices),
        dialogue=_tensor(np.repeat(np.arange(len(graphs)), vertices)),
    )
