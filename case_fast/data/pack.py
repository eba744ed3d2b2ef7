"""Packing examples into a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import Batch, Graphs
from case_fast.data.featurizer import Example, with_cls
from case_fast.data.graphs import CSR
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, SPEAKER


class Texts(Protocol):
    """A table of knowledge texts; `TextTable` and a store's own table are two."""

    def tokens(self, index: int) -> np.ndarray: ...


def make_batch(examples: Sequence[Example], texts: Texts) -> Batch:
    """Pack examples whose text ids point into ``texts``.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    cls, bos, eos = (np.array([token], dtype=np.int32) for token in (CLS, BOS, EOS))
    dialogues = np.arange(len(examples))
    context_sizes = np.array([1 + len(e.context) for e in examples])
    cu_context = _offsets(context_sizes)

    used = [np.concatenate([e.sub_utterance, e.knowledge]) for e in examples]
    distinct, place = np.unique(np.concatenate(used), return_inverse=True)
    text_rows = [with_cls(texts.tokens(int(index))) for index in distinct]

    sizes_cs = np.array([len(rows) for rows in used])
    subs = np.array([len(e.sub_utterance) for e in examples])
    first_vertex = _offsets(sizes_cs)
    knowledge_sizes = sizes_cs - subs

    reaction_rows: list[np.ndarray] = []
    reaction_dialogue: list[int] = []
    reaction_first: list[int] = []
    knowledge_reaction: list[np.ndarray] = []
    for dialogue, e in enumerate(examples):
        # Sub-utterances of equal text share one row, so that none is a negative of itself (docs/paper.md, L_fine).
        row_of: dict[int, int] = {}
        sub_row = []
        for sub, text in enumerate(e.sub_utterance.tolist()):
            if text not in row_of:
                row_of[text] = len(reaction_rows)
                words = [texts.tokens(int(index)) for index in e.reaction[e.reaction_sub == sub]]
                reaction_rows.append(np.concatenate(words) if words else np.zeros(0, dtype=np.int32))
                reaction_dialogue.append(dialogue)
            sub_row.append(row_of[text])
        reaction_first.append(sub_row[0])
        knowledge_reaction.append(np.array(sub_row)[e.knowledge_sub])
    reaction_sizes = np.array([len(row) for row in reaction_rows])
    fused = [np.arange(cu_context[d], cu_context[d + 1]) for d in reaction_dialogue]

    return Batch(
        size=len(examples),
        context=_long([part for e in examples for part in (cls, e.context)]),
        context_role=_long([part for e in examples for part in (np.array([SPEAKER]), e.context_role)]),
        cu_context=_tensor(cu_context),
        response=_long([part for e in examples for part in (cls, e.response)]),
        response_role=torch.full((sum(1 + len(e.response) for e in examples),), LISTENER),
        cu_response=_tensor(_offsets([1 + len(e.response) for e in examples])),
        decoder_input=_long([part for e in examples for part in (bos, e.response)]),
        target=_long([part for e in examples for part in (e.response, eos)]),
        cu_target=_tensor(_offsets([1 + len(e.response) for e in examples])),
        emotion=torch.tensor([e.emotion for e in examples]),
        text=_long(text_rows),
        cu_text=_tensor(_offsets([len(row) for row in text_rows])),
        cognition=_graphs([e.cognition_graph for e in examples]),
        cognition_text=_tensor(place.reshape(-1)),
        knowledge=_long([first_vertex[d] + np.arange(subs[d], sizes_cs[d]) for d in dialogues]),
        cu_knowledge=_tensor(_offsets(knowledge_sizes)),
        knowledge_dialogue=_tensor(np.repeat(dialogues, knowledge_sizes)),
        knowledge_reaction=_long(knowledge_reaction),
        reaction=_long(reaction_rows),
        cu_reaction=_tensor(_offsets(reaction_sizes)),
        reaction_dialogue=torch.tensor(reaction_dialogue),
        reaction_first=torch.tensor(reaction_first),
        has_reaction=torch.from_numpy(reaction_sizes > 0),
        reaction_context=_long(fused),
        cu_reaction_context=_tensor(_offsets([len(row) for row in fused])),
        concept=_graphs([e.concept_graph for e in examples]),
        concept_word=_long([part for e in examples for part in (cls, e.context, e.concept)]),
        concept_position=_long([part for e in examples
                                for part in (np.arange(1 + len(e.context)), e.concept_position)]),
        concept_type=_long([part for e in examples
                            for part in (np.zeros(1 + len(e.context)), np.ones(len(e.concept)))]),
        concept_intensity=torch.from_numpy(np.concatenate(
            [part for e in examples for part in (np.zeros(1, np.float32), e.context_intensity, e.concept_intensity)]
        ).astype(np.float32)),
    )


def _offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


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
