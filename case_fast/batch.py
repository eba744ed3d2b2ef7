"""A packed batch: what a model reads, without padding; the one structure that data and models share.

Ragged arrays lie end to end; ``cu_*`` (n + 1,) holds where each item starts. What padding would hold does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self

import torch
from torch import Tensor


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
