"""A packed batch: what a model reads, without padding; the one structure that data and models share.

Ragged arrays lie end to end; ``cu_*`` (n + 1,) holds where each item starts. What padding would hold does not exist. It comes in
parts: ``dialogue`` is always there, the others are there where a model asked for them (`DialogueModel.needs`), else None. What a
part can know without a model (which rows belong together, which take part in a loss) is computed when it is packed, so that no
model has to ask a GPU for the size of anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from case_fast.errors import ConfigError

PARTS = ("dialogue", "case", "concept", "relations", "emotional", "feedback")


class _Tensors:
    """Moves every tensor of a dataclass."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def joined(self, pin: bool = False) -> tuple[Self, Tensor]:
        """The same with its tensors end to end in one block of bytes, each at a multiple of 16, and the block."""
        tensors: list[Tensor] = []
        self._map(lambda tensor: tensors.append(tensor) or tensor)
        starts = [0, *itertools.accumulate(-(-tensor.nbytes // 16) * 16 for tensor in tensors)]
        block = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
        typed = {dtype: block.view(dtype) for dtype in {tensor.dtype for tensor in tensors}}
        views = [typed[x.dtype].as_strided(x.shape, x.stride(), start // x.itemsize)
                 for x, start in zip(tensors, starts, strict=False)]
        torch._foreach_copy_(views, tensors)
        view = iter(views)
        return self._map(lambda _: next(view)), block

    def laid_over(self, block: Tensor) -> Self:
        """The tensors of another block like the one that `joined` made of these."""
        return self._map(lambda tensor: _view(block, tensor.storage_offset() * tensor.itemsize, tensor))

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


def _view(block: Tensor, start: int, like: Tensor) -> Tensor:
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)


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
class CasePart(_Tensors):
    """What CASE reads of B dialogues beside their words: knowledge texts, G_CS, reactions, and the reply as the encoders read it.

    Attributes:
        response, response_role, response_position: (Y,) [CLS] and the reply's words, as the two encoders read the reply;
            cu_response (B + 1,).
        text, text_position: (S,) [CLS] + words of the distinct knowledge texts of the batch; cu_text (n_text + 1,).
        distinct_word, distinct_position: (U,) the distinct pairs of a word and its place in a text, in order; text_distinct (S,)
            the pair at each row of ``text``: what depends on these two alone is computed U times instead of S.
        cognition: graphs G_CS; cognition_text (V_cs,) the text of each vertex.
        knowledge: (K,) the vertices of G_CS that are commonsense knowledge, in order; cu_knowledge (B + 1,),
            knowledge_dialogue (K,), knowledge_reaction (K,) row of the reaction er_i that belongs to the same sub-utterance.
        reaction, reaction_position: (r,) words of the reactions of each distinct sub-utterance of a dialogue, end to end;
            cu_reaction (R + 1,), reaction_segment (r,) the reaction row that each word belongs to.
        reaction_dialogue: (R,); reaction_first: (B,) row of er_0.
        reaction_context: (C,) rows of the context that each reaction row is fused with; cu_reaction_context (R + 1,),
            reaction_context_segment (C,) its reaction row.
        known: (B',) the dialogues that have knowledge, the pairs of L_coarse.
        with_reaction: (R',) the reaction rows that have a text.
        paired: (P,) the places in ``knowledge`` whose sub-utterance has such a reaction, the pairs of L_fine; positive (P,) the
            place of that reaction in ``with_reaction``; negatives_affection, negatives_cognition (P,): how many negatives each
            pair has over reactions and over knowledge (Eq. 11).
        coarse_sizes, fine_sizes: (2,) how many pairs, and rows beside them, L_coarse and L_fine are over: B' and B', P and R'.
    """

    response: Tensor
    response_role: Tensor
    response_position: Tensor
    cu_response: Tensor
    text: Tensor
    text_position: Tensor
    cu_text: Tensor
    distinct_word: Tensor
    distinct_position: Tensor
    text_distinct: Tensor
    cognition: Graphs
    cognition_text: Tensor
    knowledge: Tensor
    cu_knowledge: Tensor
    knowledge_dialogue: Tensor
    knowledge_reaction: Tensor
    reaction: Tensor
    reaction_position: Tensor
    reaction_segment: Tensor
    cu_reaction: Tensor
    reaction_dialogue: Tensor
    reaction_first: Tensor
    reaction_context: Tensor
    reaction_context_segment: Tensor
    cu_reaction_context: Tensor
    known: Tensor
    with_reaction: Tensor
    paired: Tensor
    positive: Tensor
    negatives_affection: Tensor
    negatives_cognition: Tensor
    coarse_sizes: Tensor
    fine_sizes: Tensor


@dataclass
class ConceptPart(_Tensors):
    """The emotional concept graphs G_EC: [CLS], the context's words, the concepts.

    Attributes:
        graph: G_EC.
        word, position, type: (V_ec,) of each vertex; type 1 is a concept. intensity: (V_ec,) float32, w of each vertex.
    """

    graph: Graphs
    word: Tensor
    position: Tensor
    type: Tensor
    intensity: Tensor


@dataclass
class RelationsPart(_Tensors):
    """The inferences about the whole last utterance, u_0, as strings of words, without the words "to" and "none".

    Attributes:
        cognition, cognition_position: (L,) [CLS] and the words of all inferences of a relation end to end, sequence 4 b + r for
            relation r (xIntent, xNeed, xWant, xEffect) of dialogue b; cu_cognition (4B + 1,).
        reaction, reaction_position: (F,) the words of all reactions of a dialogue end to end; cu_reaction (B + 1,),
            reaction_segment (F,) the dialogue.
    """

    cognition: Tensor
    cognition_position: Tensor
    cu_cognition: Tensor
    reaction: Tensor
    reaction_position: Tensor
    reaction_segment: Tensor
    cu_reaction: Tensor


@dataclass
class EmotionalPart(_Tensors):
    """The emotional words of the contexts, in order: those of the list that the store was prepared with, or of the NRC-VAD
    lexicon, that are no stop words.

    Attributes:
        word, position, segment: (W,) [SEP] and the emotional words of a dialogue's context; position counts these alone.
        cu: (B + 1,).
    """

    word: Tensor
    position: Tensor
    segment: Tensor
    cu: Tensor


@dataclass
class FeedbackPart(_Tensors):
    """What the speaker says after the replies, and the replies that are judged by it: of the J dialogues that have it alone.

    Attributes:
        dialogue: (J,) the dialogues. weight: (J,) float64, each one's share in a mean over them, 1/J.
        word: (F,) the words of the feedback, end to end; cu (J + 1,). emotional: (F',) those of them that are emotional words;
            cu_emotional (J + 1,).
        reply, reply_segment: (R,) the rows of ``target`` that are theirs, EOS among them, and which of the J each belongs to;
            cu_reply (J + 1,). reply_emotional: (R',) those of these rows that are emotional words; cu_reply_emotional (J + 1,).
        lexicon: (V,) bool, the emotional words of the vocabulary.
    """

    dialogue: Tensor
    weight: Tensor
    word: Tensor
    cu: Tensor
    emotional: Tensor
    cu_emotional: Tensor
    reply: Tensor
    reply_segment: Tensor
    cu_reply: Tensor
    reply_emotional: Tensor
    cu_reply_emotional: Tensor
    lexicon: Tensor


class Others(Protocol):
    """The processes that have a share each of one batch, as a loss over the whole batch needs them: each of them asks for the
    same things in the same order.

    Attributes:
        count: how many processes. seed: of what is drawn once for the whole batch, where `Batch.seed` is of the share alone.
        negatives: whether the others' rows are negatives of the own ones.
    """

    count: int
    seed: int
    negatives: bool

    def total(self, x: Tensor) -> Tensor:
        """x, of any shape, summed over the processes; without gradient."""

    def pairs(self, x: Tensor, y: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows x (P, d), y (Q, d) and positive (P,) of the whole batch, in its order, and (2,) their numbers.

        Every process makes the same of them: in each of their losses that has to count as 1 / ``count`` of what they make.
        """


@dataclass
class Batch(_Tensors):
    """B listener turns. All index tensors are int64. ``*_position``: the place of each row in its sequence, ``*_segment``: the
    sequence, from 0, so that no model has to work them out of offsets.

    Attributes:
        size: B.
        longest: one more than the greatest of all positions.
        seed: () int64, of everything that is drawn in a forward pass by counter (dropout, negatives), in [0, 2^63): one number a
            step. A tensor, for kernels to read: a step that was captured draws by what it holds when the step runs.
        sizes: (2,) B and M: the dialogues and the target words that losses are over.
        context, context_role, context_position, context_segment: (T,) [CLS] and the context's words, with role tokens;
            cu_context (B + 1,).
        decoder_input, target, target_position, target_segment: (M,) BOS + words, and words + EOS; cu_target (B + 1,).
        emotion: (B,) label, -1 where unknown.
        dialogue_weight, target_weight, bow_weight: (B,), (M,), (M,) float64, each row's share in a mean over dialogues, over
            target words, and over dialogues of the mean over their target words: 1/B, 1/M, 1/(B m) for a reply of m.
        case, concept, relations, emotional, feedback: the other parts, or None.
        others: None, or this batch is a process's share of a larger one: weights and ``sizes`` are then of the larger one, and a
            share that has no dialogue holds one that takes part in nothing.
    """

    size: int
    longest: int
    seed: Tensor
    sizes: Tensor
    context: Tensor
    context_role: Tensor
    context_position: Tensor
    context_segment: Tensor
    cu_context: Tensor
    decoder_input: Tensor
    target: Tensor
    target_position: Tensor
    target_segment: Tensor
    cu_target: Tensor
    emotion: Tensor
    dialogue_weight: Tensor
    target_weight: Tensor
    bow_weight: Tensor
    case: CasePart | None = None
    concept: ConceptPart | None = None
    relations: RelationsPart | None = None
    emotional: EmotionalPart | None = None
    feedback: FeedbackPart | None = None
    others: Others | None = None

    def __len__(self) -> int:
        return self.size

    def total(self, x: Tensor) -> Tensor:
        """x, which belongs to these dialogues, summed over all shares of the batch; without gradient."""
        return x if self.others is None else self.others.total(x)

    @property
    def seed_of_all(self) -> Tensor | int:
        """The seed of what is drawn once for the whole batch, whatever the share."""
        return self.seed if self.others is None else self.others.seed

    def require(self, parts: Iterable[str]) -> Self:
        """The batch itself; `ConfigError` if it lacks one of the parts that a model needs."""
        if missing := [part for part in parts if part != "dialogue" and getattr(self, part) is None]:
            raise ConfigError(f"the batch lacks what the model reads: {', '.join(missing)}; make it with "
                              "store.batch(split, indices, model.needs)")
        return self
