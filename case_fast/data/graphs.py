"""The two heterogeneous graphs of section 3.1 as CSR arrays with relation ids (docs/paper.md).

Undirected edges are stored in both directions; self-loops are explicit; a row's neighbours ascend.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SELF, GLOBAL, TEMPORARY = 0, 1, 2
COGNITION_GRAPH_RELATIONS = ("self", "global", "temporary", "xIntent", "xNeed", "xWant", "xEffect")
CONCEPT_GRAPH_RELATIONS = ("self", "global", "temporary", "concept")
FIRST_COMMONSENSE = 3  # relation id of xIntent; the others follow in order
CONCEPT = 3


@dataclass(frozen=True)
class CSR:
    """``indices[indptr[i]:indptr[i+1]]`` are the neighbours of vertex i, ``relation`` the types of these edges.

    All int32; ``relation`` read from a store is uint8.
    """

    indptr: np.ndarray
    indices: np.ndarray
    relation: np.ndarray

    def edges(self) -> list[tuple[int, int, int]]:
        """(vertex, neighbour, relation) of every stored edge, in order."""
        rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        return [tuple(map(int, edge)) for edge in zip(rows, self.indices, self.relation, strict=True)]


def _csr(vertices: int, one_way: list[tuple[np.ndarray, np.ndarray, np.ndarray | int]]) -> CSR:
    """CSR of self-loops plus undirected edges given once as (from, to, relation)."""
    loops = np.arange(vertices, dtype=np.int32)
    heads, tails, relations = [loops], [loops], [np.full(vertices, SELF, dtype=np.int32)]
    for left, right, relation in one_way:
        relation = np.broadcast_to(np.asarray(relation, dtype=np.int32), left.shape)
        heads += [left, right]
        tails += [right, left]
        relations += [relation, relation]
    head, tail, kind = (np.concatenate(parts).astype(np.int32) for parts in (heads, tails, relations))
    order = np.lexsort((kind, tail, head))
    indptr = np.zeros(vertices + 1, dtype=np.int32)
    np.cumsum(np.bincount(head, minlength=vertices), out=indptr[1:])
    return CSR(indptr, tail[order], kind[order])


def cognition_graph(sub_utterances: int, knowledge_sub: np.ndarray, knowledge_relation: np.ndarray) -> CSR:
    """G_CS: vertices u_0 .. u_t, then the knowledge vertices.

    Args:
        sub_utterances: t + 1, the whole last utterance and its pieces (at least 2).
        knowledge_sub: (n,) index of the sub-utterance that each knowledge vertex was inferred from.
        knowledge_relation: (n,) 0..3 for xIntent, xNeed, xWant, xEffect.
    """
    pieces = np.arange(1, sub_utterances, dtype=np.int32)
    knowledge = sub_utterances + np.arange(len(knowledge_sub), dtype=np.int32)
    return _csr(
        sub_utterances + len(knowledge_sub),
        [
            (np.zeros_like(pieces), pieces, GLOBAL),
            (pieces[:-1], pieces[1:], TEMPORARY),
            (np.asarray(knowledge_sub, dtype=np.int32), knowledge, FIRST_COMMONSENSE + np.asarray(knowledge_relation)),
        ],
    )


def concept_graph(tokens: int, concept_edges: list[tuple[int, int]], concepts: int) -> CSR:
    """G_EC: vertex 0 is [CLS], 1 .. n the context tokens, then the concepts.

    Args:
        tokens: n.
        concept_edges: (token from 0, concept from 0), one for each occurrence of a token that a concept belongs to.
        concepts: number of concept vertices.
    """
    words = np.arange(1, tokens + 1, dtype=np.int32)
    others = np.arange(1, tokens + concepts + 1, dtype=np.int32)
    pairs = np.asarray(concept_edges, dtype=np.int32).reshape(-1, 2)
    return _csr(
        1 + tokens + concepts,
        [
            (np.zeros_like(others), others, GLOBAL),
            (words[:-1], words[1:], TEMPORARY),
            (1 + pairs[:, 0], 1 + tokens + pairs[:, 1], CONCEPT),
        ],
    )
