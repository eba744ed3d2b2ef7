"""Both graphs, edge by edge and by law."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from case_fast.data.graphs import (
    COGNITION_GRAPH_RELATIONS,
    CONCEPT,
    CONCEPT_GRAPH_RELATIONS,
    CSR,
    FIRST_COMMONSENSE,
    cognition_graph,
    concept_graph,
)
from case_fast.knowledge import COGNITION_RELATIONS

SELF, GLOBAL, TEMPORARY, INTENT, NEED, WANT, EFFECT = range(7)


def both_ways(*edges: tuple[int, int, int]) -> Counter[tuple[int, int, int]]:
    return Counter([*edges, *((b, a, relation) for a, b, relation in edges)])


def loops(vertices: int) -> Counter[tuple[int, int, int]]:
    return Counter((v, v, SELF) for v in range(vertices))


def lawful(graph: CSR, vertices: int) -> None:
    """What holds for every graph: int32 CSR, rows sorted by neighbour, symmetric, one self-loop a vertex."""
    assert all(part.dtype == np.int32 for part in (graph.indptr, graph.indices, graph.relation))
    assert len(graph.indptr) == vertices + 1 and graph.indptr[0] == 0 and graph.indptr[-1] == len(graph.indices)
    assert len(graph.indices) == len(graph.relation)
    for start, end in zip(graph.indptr, graph.indptr[1:], strict=False):
        assert (np.diff(graph.indices[start:end]) >= 0).all()
    edges = Counter(graph.edges())
    assert edges == Counter({(b, a, r): count for (a, b, r), count in edges.items()})
    assert Counter({edge: count for edge, count in edges.items() if edge[0] == edge[1]}) == loops(vertices)
    assert all((relation == SELF) == (a == b) for a, b, relation in edges)


def test_relations_keep_their_order():
    assert COGNITION_GRAPH_RELATIONS == ("self", "global", "temporary", "xIntent", "xNeed", "xWant", "xEffect")
    assert CONCEPT_GRAPH_RELATIONS == ("self", "global", "temporary", "concept")
    assert COGNITION_GRAPH_RELATIONS[FIRST_COMMONSENSE:] == COGNITION_RELATIONS
    assert CONCEPT_GRAPH_RELATIONS[CONCEPT] == "concept"


def test_a_cognition_graph_is_the_one_by_hand():
    """u_0 = 'I failed. So sad. Help!' and its three sentences; inferences a, b of u_0, c of u_2, d of u_3."""
    graph = cognition_graph(4, np.array([0, 0, 2, 3]), np.array([0, 3, 1, 2]))  # a xIntent, b xEffect, c xNeed, d xWant
    a, b, c, d = 4, 5, 6, 7
    assert Counter(graph.edges()) == loops(8) + both_ways(
        (0, 1, GLOBAL), (0, 2, GLOBAL), (0, 3, GLOBAL), (1, 2, TEMPORARY), (2, 3, TEMPORARY),
        (0, a, INTENT), (0, b, EFFECT), (2, c, NEED), (3, d, WANT),
    )
    lawful(graph, 8)
    rows = [list(zip(graph.indices[i:j].tolist(), graph.relation[i:j].tolist(), strict=True))
            for i, j in zip(graph.indptr, graph.indptr[1:], strict=False)]
    assert rows[0] == [(0, SELF), (1, GLOBAL), (2, GLOBAL), (3, GLOBAL), (a, INTENT), (b, EFFECT)]
    assert rows[2] == [(0, GLOBAL), (1, TEMPORARY), (2, SELF), (3, TEMPORARY), (c, NEED)]
    assert rows[d] == [(3, WANT), (d, SELF)]


def test_the_smallest_cognition_graph_is_one_sentence():
    graph = cognition_graph(2, np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert Counter(graph.edges()) == loops(2) + both_ways((0, 1, GLOBAL))


def test_equal_inferences_of_two_relations_are_two_vertices():
    graph = cognition_graph(2, np.array([1, 1]), np.array([2, 3]))
    assert Counter(graph.edges()) == loops(4) + both_ways((0, 1, GLOBAL), (1, 2, WANT), (1, 3, EFFECT))


def test_a_concept_graph_is_the_one_by_hand():
    """[CLS] my exam , my dog . exam, with concepts p of both 'exam's and q of 'dog' and of the first 'exam'."""
    graph = concept_graph(7, [(1, 0), (6, 0), (4, 1), (1, 1)], 2)
    p, q = 8, 9
    assert Counter(graph.edges()) == loops(10) + both_ways(
        *((0, v, GLOBAL) for v in range(1, 10)),
        *((v, v + 1, TEMPORARY) for v in range(1, 7)),
        (2, p, CONCEPT), (7, p, CONCEPT), (5, q, CONCEPT), (2, q, CONCEPT),
    )
    lawful(graph, 10)


@pytest.mark.parametrize(("tokens", "edges"), [(0, 0), (1, 2), (2, 6)])
def test_the_smallest_concept_graphs_have_all_their_edges(tokens, edges):
    graph = concept_graph(tokens, [], 0)
    lawful(graph, 1 + tokens)
    assert len(graph.indices) == 1 + tokens + edges


def test_parallel_edges_count_separately():
    graph = concept_graph(2, [(0, 0), (0, 0), (1, 0)], 1)
    assert Counter(graph.edges())[1, 3, CONCEPT] == Counter(graph.edges())[3, 1, CONCEPT] == 2
    lawful(graph, 4)


@given(pieces=st.integers(1, 8), knowledge=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), max_size=40))
def test_any_cognition_graph_keeps_the_laws(pieces, knowledge):
    subs = np.array([min(sub, pieces) for sub, _ in knowledge], dtype=np.int32)
    relations = np.array([relation for _, relation in knowledge], dtype=np.int32)
    graph = cognition_graph(pieces + 1, subs, relations)
    k = len(knowledge)
    lawful(graph, pieces + 1 + k)
    assert len(graph.indices) == (pieces + 1 + k) + 2 * (pieces + (pieces - 1) + k)
    count = Counter(relation for *_, relation in graph.edges())
    assert count[GLOBAL] == 2 * pieces and count[TEMPORARY] == 2 * (pieces - 1)
    for relation in range(4):
        assert count[FIRST_COMMONSENSE + relation] == 2 * int((relations == relation).sum())


@given(
    tokens=st.integers(0, 30),
    concepts=st.integers(0, 10),
    pairs=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 9)), max_size=30),
)
def test_any_concept_graph_keeps_the_laws(tokens, concepts, pairs):
    pairs = [(token, concept) for token, concept in pairs if token < tokens and concept < concepts]
    graph = concept_graph(tokens, pairs, concepts)
    lawful(graph, 1 + tokens + concepts)
    assert len(graph.indices) == (1 + tokens + concepts) + 2 * (tokens + concepts + max(tokens - 1, 0) + len(pairs))
    neighbours = graph.indices[graph.indptr[0] : graph.indptr[1]].tolist()
    assert neighbours == list(range(1 + tokens + concepts))  # [CLS] sees itself and every other vertex, once
