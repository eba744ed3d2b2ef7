"""A packed batch: what the model reads, without padding.

Ragged arrays lie end to end; ``cu_*`` (n + 1,) holds where each item starts. What padding would hold does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from case_fast.data.featurizer import Example, with_cls
from case_fast.data.graphs import CSR
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, SPEAKER


class Texts(Protocol):
    """A table of knowledge texts; `TextTable` and a store's own table are two."""

    def tokens(self, index: int) -> np.ndarray: ...


class _Tensors:
    """Moves every tensor of a dataclass."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Self:
        moved = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value = function(value)
            elif is_dataclass(value):
                value = value._map(function)
            moved[item.name] = value
        return type(self)(**moved)


@dataclass
class Graphs(_Tensors):
    """The graphs of a batch as one block-diagonal CSR.

    Attributes:
        indptr (V + 1,), indices (E,), relation (E,): int32, as `case_fast.ops.graph_attention` takes them.
        cu_vertices: (B + 1,) int64, first vertex of each dialogue's graph.
        dialogue: (V,) int64, the dialogue that each vertex belongs to.
    """

    indptr: Tensor
    indices: Tensor
    relation: Tensor
    cu_vertices: Tensor
    dialogue: Tensor


@dataclass
class Batch(_Tensors):
    """B listener turns. All index tensors are int64.

    Attributes:
        context, context_role: (T,) [CLS] and the context's words, with role tokens; cu_context (B + 1,).
        response, response_role: (Y,) [CLS] and the reply's words, as the two encoders read the reply; cu_response (B + 1,).
        decoder_input, target: (M,) BOS + words, and words + EOS; cu_target (B + 1,).
        emotion: (B,) label, -1 where unknown.
        text: (S,) [CLS] + words of the distinct knowledge texts of the batch; cu_text (n_text + 1,).
        cognition: graphs G_CS; cognition_text (V_cs,) the text of each vertex.
        knowledge: (K,) the vertices of G_CS that are commonsense knowledge, in order; cu_knowledge (B + 1,),
            knowledge_dialogue (K,), knowledge_reaction (K,) row of the reaction er_i that belongs to the same sub-utterance.
        reaction: (r,) words of the reactions of each distinct sub-utterance of a dialogue, end to end; cu_reaction (R + 1,).
        reaction_dialogue: (R,); reaction_first: (B,) row of er_0; has_reaction (R,) bool, whether there was a text.
        reaction_context: (C,) positions of the context that each reaction row is fused with; cu_reaction_context (R + 1,).
        concept: graphs G_EC; concept_word, concept_position, concept_type (V_ec,), concept_intensity (V_ec,) float32.
    """

    size: int
    context: Tensor
    context_role: Tensor
    cu_context: Tensor
    response: Tensor
    response_role: Tensor
    cu_response: Tensor
    decoder_input: Tensor
    target: Tensor
    cu_target: Tensor
    emotion: Tensor
    text: Tensor
    cu_text: Tensor
    cognition: Graphs
    cognition_text: Tensor
    knowledge: Tensor
    cu_knowledge: Tensor
    knowledge_dialogue: Tensor
    knowledge_reaction: Tensor
    reaction: Tensor
    cu_reaction: Tensor
    reaction_dialogue: Tensor
    reaction_first: Tensor
    has_reaction: Tensor
    reaction_context: Tensor
    cu_reaction_context: Tensor
    concept: Graphs
    concept_word: Tensor
    concept_position: Tensor
    concept_type: Tensor
    concept_intensity: Tensor

    def __len__(self) -> int:
        return self.size


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
        # Sub-utterances of equal text share one row, so that none is a negative of itself (case.md, fine MIM).
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
    )  # fmt: skip


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
