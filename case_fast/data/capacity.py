"""Batches filled up to a fixed number of rows of each kind, so that one CUDA graph serves all batches that fit.

What fills up belongs to spare dialogues behind the real ones, and takes part in nothing: no loss weighs it, no pair holds it, no
real row reads it, so that its gradients are 0 and those of the real rows are what they are without it. It lies in sequences of
some 32 rows, the empty ones before them: of each sequence there is a first row that can be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from case_fast.batch import Batch, CasePart, ConceptPart, EmotionalPart, FeedbackPart, Graphs, RelationsPart

SHARES = (0.5, 0.97)  # of batches that the first capacities hold; the last one holds every batch seen, and MARGIN more
MARGIN = 1.1
PIECE = 32  # rows of a sequence that fills up


@dataclass(frozen=True)
class Capacity:
    """How many rows of each kind a filled batch has; 0 of those of a part that the model does not read.

    Attributes:
        longest: positions are below it.
        dialogues: spare ones included.
        context, target, text, texts, distinct: T, M, S, knowledge texts, distinct pairs of a word and its place.
        cognition_vertices, cognition_edges, concept_vertices, concept_edges: of both graphs.
        knowledge: K, and as many pairs of L_fine. reactions, reaction, reaction_context: R, r, C.
        strung, felt: L and F of the strings of inferences and of reactions. emotional: W. feedback: F.
    """

    longest: int
    dialogues: int
    context: int
    target: int
    text: int = 0
    texts: int = 0
    distinct: int = 0
    cognition_vertices: int = 0
    cognition_edges: int = 0
    knowledge: int = 0
    reactions: int = 0
    reaction: int = 0
    reaction_context: int = 0
    concept_vertices: int = 0
    concept_edges: int = 0
    strung: int = 0
    felt: int = 0
    emotional: int = 0
    feedback: int = 0

    def holds(self, batch: Batch) -> bool:
        """Whether the batch fits, with a row and a sequence left over where something must lie in them."""
        sizes = measured(batch)
        return all(size + (name in _WITH_ROOM) <= getattr(self, name) for name, size in sizes.items())


_WITH_ROOM = {"dialogues", "context", "target", "text", "texts", "cognition_vertices", "reactions", "reaction_context",
              "concept_vertices", "strung", "emotional"}


def measured(batch: Batch) -> dict[str, int]:
    """Its rows of each kind, by the names of `Capacity`."""
    found = {"longest": batch.longest, "dialogues": batch.size, "context": len(batch.context), "target": len(batch.target)}
    if (case := batch.case) is not None:
        found |= {
            "text": len(case.text), "texts": len(case.cu_text) - 1, "distinct": len(case.distinct_word),
            "cognition_vertices": len(case.cognition_text), "cognition_edges": len(case.cognition.indices),
            "knowledge": len(case.knowledge), "reactions": len(case.reaction_dialogue), "reaction": len(case.reaction),
            "reaction_context": len(case.reaction_context),
        }
    if (concept := batch.concept) is not None:
        found |= {"concept_vertices": len(concept.word), "concept_edges": len(concept.graph.indices)}
    if (relations := batch.relations) is not None:
        found |= {"strung": len(relations.cognition), "felt": len(relations.reaction)}
    if batch.emotional is not None:
        found |= {"emotional": len(batch.emotional.word)}
    if batch.feedback is not None:
        found |= {"feedback": len(batch.feedback.word)}
    return found


def capacities(batches: Iterable[Batch], longest: int) -> list[Capacity]:
    """The capacities that serve batches like these, the smallest first: for `SHARES` of them, and for all.

    Args:
        longest: positions below which a model looks its embeddings up.
    """
    seen = [measured(batch) for batch in batches]
    names = [name for name in seen[0] if name not in ("longest", "dialogues")]
    sizes = np.array([[size[name] for name in names] for size in seen])
    dialogues = max(size["dialogues"] for size in seen)
    spare = max(1, dialogues // 2)  # so that what fills up makes no sequence much longer than those of real dialogues

    def of(rows: np.ndarray) -> Capacity:
        return Capacity(longest, dialogues + spare, **{
            name: -(-int(math.ceil(size) + 1) // 16) * 16 for name, size in zip(names, rows, strict=True)
        })

    found = [of(_holding(sizes, share)) for share in SHARES]
    return list(dict.fromkeys([*found, of(sizes.max(0) * MARGIN)]))


def _holding(sizes: np.ndarray, share: float) -> np.ndarray:
    """Sizes, all at one quantile, that so large a share of the batches stay within in every kind at once."""
    low, high = share, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if (sizes <= np.quantile(sizes, middle, axis=0)).all(1).mean() < share:
            low = middle
        else:
            high = middle
    return np.quantile(sizes, high, axis=0)


def fitted(batch: Batch, capacity: Capacity) -> Batch | None:
    """The batch filled up to ``capacity``, on the CPU; None where it does not fit."""
    if not capacity.holds(batch):
        return None
    size, dialogues = batch.size, capacity.dialogues
    context, target = (_Rows(cu, rows, dialogues) for cu, rows in ((batch.cu_context, capacity.context),
                                                                    (batch.cu_target, capacity.target)))
    return Batch(
        size=dialogues, longest=capacity.longest, seed=batch.seed, sizes=batch.sizes,
        context=context.filled(batch.context), context_role=context.filled(batch.context_role),
        context_position=context.filled(batch.context_position, np.minimum(context.position, capacity.longest - 1)),
        context_segment=context.filled(batch.context_segment, context.segment), cu_context=context.cu,
        decoder_input=target.filled(batch.decoder_input), target=target.filled(batch.target),
        target_position=target.filled(batch.target_position, np.minimum(target.position, capacity.longest - 1)),
        target_segment=target.filled(batch.target_segment, target.segment), cu_target=target.cu,
        emotion=_filled(batch.emotion, dialogues), dialogue_weight=_filled(batch.dialogue_weight, dialogues),
        target_weight=target.filled(batch.target_weight), bow_weight=target.filled(batch.bow_weight),
        case=None if batch.case is None else _case(batch.case, capacity, size, target, len(batch.context)),
        concept=None if batch.concept is None else _concept(batch.concept, capacity),
        relations=None if batch.relations is None else _relations(batch.relations, capacity),
        emotional=None if batch.emotional is None else _emotional(batch.emotional, capacity),
        feedback=None if batch.feedback is None else _feedback(batch.feedback, capacity, size, len(batch.target)),
    )


def _case(case: CasePart, capacity: Capacity, size: int, target: _Rows, context: int) -> CasePart:
    """size: the real dialogues; context: their rows."""
    c, last, spread = capacity, capacity.longest - 1, _spread
    text = _Rows(case.cu_text, c.text, c.texts)
    knowledge = _Rows(case.cu_knowledge, c.knowledge, c.dialogues)
    reaction = _Rows(case.cu_reaction, c.reaction, c.reactions)
    fused = _Rows(case.cu_reaction_context, c.reaction_context, c.reactions)
    texts, vertices, reactions = len(case.cu_text) - 1, len(case.cognition_text), len(case.reaction_dialogue)

    return CasePart(
        response=target.filled(case.response), response_role=target.filled(case.response_role),
        response_position=target.filled(case.response_position, np.minimum(target.position, last)), cu_response=target.cu,
        text=text.filled(case.text), text_position=text.filled(case.text_position, np.minimum(text.position, last)),
        cu_text=text.cu,
        distinct_word=_filled(case.distinct_word, c.distinct), distinct_position=_filled(case.distinct_position, c.distinct),
        text_distinct=spread(case.text_distinct, c.text, len(case.distinct_word), c.distinct),
        cognition=_graphs(case.cognition, c.cognition_vertices, c.cognition_edges, c.dialogues),
        cognition_text=spread(case.cognition_text, c.cognition_vertices, texts, c.texts),
        knowledge=spread(case.knowledge, c.knowledge, vertices, c.cognition_vertices), cu_knowledge=knowledge.cu,
        knowledge_dialogue=knowledge.filled(case.knowledge_dialogue, knowledge.segment),
        knowledge_reaction=spread(case.knowledge_reaction, c.knowledge, reactions, c.reactions),
        reaction=reaction.filled(case.reaction),
        reaction_position=reaction.filled(case.reaction_position, np.minimum(reaction.position, last)),
        reaction_segment=reaction.filled(case.reaction_segment, reaction.segment), cu_reaction=reaction.cu,
        reaction_dialogue=spread(case.reaction_dialogue, c.reactions, size, c.dialogues),
        reaction_first=spread(case.reaction_first, c.dialogues, reactions, c.reactions),
        reaction_context=spread(case.reaction_context, c.reaction_context, context, c.context),
        reaction_context_segment=fused.filled(case.reaction_context_segment, fused.segment), cu_reaction_context=fused.cu,
        known=spread(case.known, c.dialogues, size, c.dialogues),
        with_reaction=spread(case.with_reaction, c.reactions, reactions, c.reactions),
        paired=spread(case.paired, c.knowledge, len(case.knowledge), c.knowledge), positive=_filled(case.positive, c.knowledge),
        negatives_affection=_filled(case.negatives_affection, c.knowledge),
        negatives_cognition=_filled(case.negatives_cognition, c.knowledge),
        coarse_sizes=case.coarse_sizes, fine_sizes=case.fine_sizes,
    )


def _concept(concept: ConceptPart, c: Capacity) -> ConceptPart:
    vertices = c.concept_vertices
    return ConceptPart(
        graph=_graphs(concept.graph, vertices, c.concept_edges, c.dialogues), word=_filled(concept.word, vertices),
        position=_filled(concept.position, vertices), type=_filled(concept.type, vertices),
        intensity=_filled(concept.intensity, vertices),
    )


def _relations(relations: RelationsPart, c: Capacity) -> RelationsPart:
    kinds = (len(relations.cu_cognition) - 1) // (len(relations.cu_reaction) - 1)
    cognition = _Rows(relations.cu_cognition, c.strung, kinds * c.dialogues)
    reaction = _Rows(relations.cu_reaction, c.felt, c.dialogues)
    last = c.longest - 1
    return RelationsPart(
        cognition=cognition.filled(relations.cognition),
        cognition_position=cognition.filled(relations.cognition_position, np.minimum(cognition.position, last)),
        cu_cognition=cognition.cu,
        reaction=reaction.filled(relations.reaction),
        reaction_position=reaction.filled(relations.reaction_position, np.minimum(reaction.position, last)),
        reaction_segment=reaction.filled(relations.reaction_segment, reaction.segment), cu_reaction=reaction.cu,
    )


def _emotional(emotional: EmotionalPart, c: Capacity) -> EmotionalPart:
    rows = _Rows(emotional.cu, c.emotional, c.dialogues)
    return EmotionalPart(
        word=rows.filled(emotional.word),
        position=rows.filled(emotional.position, np.minimum(rows.position, c.longest - 1)),
        segment=rows.filled(emotional.segment, rows.segment), cu=rows.cu,
    )


def _feedback(feedback: FeedbackPart, c: Capacity, size: int, target: int) -> FeedbackPart:
    """size, target: the real dialogues, and rows of their replies. Spare dialogues are judged too, for nothing."""
    reply, reply_emotional = (_Rows(cu, c.target, c.dialogues) for cu in (feedback.cu_reply, feedback.cu_reply_emotional))
    word, emotional = (_Rows(cu, c.feedback, c.dialogues) for cu in (feedback.cu, feedback.cu_emotional))
    return FeedbackPart(
        dialogue=_spread(feedback.dialogue, c.dialogues, size, c.dialogues), weight=_filled(feedback.weight, c.dialogues),
        word=word.filled(feedback.word), cu=word.cu, emotional=emotional.filled(feedback.emotional), cu_emotional=emotional.cu,
        reply=_spread(feedback.reply, c.target, target, c.target),
        reply_segment=reply.filled(feedback.reply_segment, reply.segment), cu_reply=reply.cu,
        reply_emotional=_spread(feedback.reply_emotional, c.target, target, c.target), cu_reply_emotional=reply_emotional.cu,
        lexicon=feedback.lexicon,
    )


def _graphs(graph: Graphs, vertices: int, edges: int, dialogues: int) -> Graphs:
    """Edges that fill up join vertices that do to themselves, as many to each."""
    real, left = len(graph.dialogue), edges - len(graph.indices)
    rows = _Rows(graph.cu_vertices, vertices, dialogues)
    spare = vertices - real
    end = len(graph.indices) + np.arange(1, spare + 1) * left // spare
    return Graphs(
        indptr=_filled(graph.indptr, vertices + 1, end),
        indices=_filled(graph.indices, edges, np.repeat(np.arange(real, vertices), np.diff(end, prepend=len(graph.indices)))),
        relation=_filled(graph.relation, edges), cu_vertices=rows.cu, dialogue=rows.filled(graph.dialogue, rows.segment),
    )


class _Rows:
    """Rows in sequences, filled up to so many of both.

    Attributes:
        cu: (sequences + 1,), to the last of all rows.
        position, segment: of the rows that fill up: the place in their sequence, and its number.
    """

    def __init__(self, cu: Tensor, rows: int, sequences: int):
        real, used = len(cu) - 1, int(cu[-1])
        self.total, spare, left = rows, sequences - real, rows - used
        piece = max(PIECE, -(-left // max(spare, 1)))
        lengths = np.zeros(spare, dtype=np.int64)
        whole, rest = divmod(left, piece)
        lengths[spare - whole :] = piece
        if rest:
            lengths[spare - whole - 1] = rest
        end = used + np.cumsum(lengths)
        self.cu = _filled(cu, sequences + 1, end)
        self.segment = np.repeat(np.arange(real, sequences), lengths)
        self.position = np.arange(used, rows) - np.repeat(end - lengths, lengths)

    def filled(self, x: Tensor, rest: np.ndarray | int = 0) -> Tensor:
        return _filled(x, self.total, rest)


def _spread(x: Tensor, total: int, first: int, end: int) -> Tensor:
    """Filled up with what fills up elsewhere, [first, end), in turn."""
    return _filled(x, total, np.minimum(first + np.arange(total - len(x)) % max(end - first, 1), end - 1))


def _filled(x: Tensor, total: int, rest: np.ndarray | int = 0) -> Tensor:
    """x (n,) and behind it ``rest``, (total - n,) or one number."""
    old = x.numpy()
    out = np.empty(total, dtype=old.dtype)
    out[: len(old)] = old
    out[len(old) :] = rest
    return torch.from_numpy(out)
