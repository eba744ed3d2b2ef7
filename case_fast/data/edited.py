"""An example with other knowledge or other words: what is taken out, put in or exchanged, its graphs made anew."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from case_fast.data.featurizer import Example
from case_fast.data.graphs import CONCEPT, cognition_graph, concept_graph

Edges = list[tuple[int, int]]  # (word of the context, concept), from 0


def with_inferences(example: Example, knowledge: np.ndarray, sub: np.ndarray, relation: np.ndarray) -> Example:
    """Its own sub-utterances with these inferences (k,): texts, the sub-utterances they are of, their relations."""
    graph = cognition_graph(len(example.sub_utterance), sub, relation)
    return replace(example, knowledge=knowledge, knowledge_sub=sub, knowledge_relation=relation, cognition_graph=graph)


def with_reactions(example: Example, reaction: np.ndarray, sub: np.ndarray) -> Example:
    """Its own sub-utterances with these reactions (r,)."""
    return replace(example, reaction=reaction, reaction_sub=sub)


def with_concepts(example: Example, concept: np.ndarray, intensity: np.ndarray, edges: Edges) -> Example:
    """Its own words with these concepts (c,), each of which has an edge; a concept's position is that of its first word."""
    words = len(example.context)
    first = {of: word + 1 for word, of in sorted(edges, reverse=True)}
    position = np.array([first[of] for of in range(len(concept))], dtype=np.int32)
    return replace(example, concept=concept, concept_intensity=intensity, concept_position=position,
                   concept_graph=concept_graph(words, edges, len(concept)))


def edges_of(example: Example) -> Edges:
    """Which words of the context each concept is joined to."""
    graph, first = example.concept_graph, 1 + len(example.context)
    vertex = np.arange(len(graph.indptr) - 1).repeat(np.diff(graph.indptr))
    chosen = (graph.relation == CONCEPT) & (vertex >= first)
    return list(zip((graph.indices[chosen] - 1).tolist(), (vertex[chosen] - first).tolist(), strict=True))


def without_inferences(example: Example, rows: Sequence[int]) -> Example:
    """Without the inferences at these rows."""
    columns = (example.knowledge, example.knowledge_sub, example.knowledge_relation)
    return with_inferences(example, *[np.delete(column, rows) for column in columns])


def without_reactions(example: Example, rows: Sequence[int]) -> Example:
    """Without the reactions at these rows."""
    return with_reactions(example, np.delete(example.reaction, rows), np.delete(example.reaction_sub, rows))


def without_concepts(example: Example, rows: Sequence[int]) -> Example:
    """Without the concepts at these rows."""
    return _with_fewer_concepts(example, edges_of(example), set(rows))


def without_words(example: Example, rows: Sequence[int]) -> Example:
    """Without the words of the context at these rows, from 0, and without the concepts that hang on them alone. What was inferred
    from the texts stays."""
    gone = set(rows)
    place = {word: new for new, word in enumerate(word for word in range(len(example.context)) if word not in gone)}
    edges = [(place[word], of) for word, of in edges_of(example) if word in place]
    fewer = replace(example, **{name: np.delete(getattr(example, name), rows)
                                for name in ("context", "context_role", "context_intensity")})
    return _with_fewer_concepts(fewer, edges, set(range(len(example.concept))) - {of for _, of in edges})


def _with_fewer_concepts(example: Example, edges: Edges, gone: Collection[int]) -> Example:
    """Its words with those of its concepts that are not gone, joined by those of these edges that are left."""
    kept = [of for of in range(len(example.concept)) if of not in gone]
    place = {of: new for new, of in enumerate(kept)}
    return with_concepts(example, example.concept[kept], example.concept_intensity[kept],
                         [(word, place[of]) for word, of in edges if of in place])
