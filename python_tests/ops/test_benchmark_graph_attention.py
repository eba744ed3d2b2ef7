"""The benchmark of graph_attention: its peers are right, its cases are what they say."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.family import family_of
from benchmarks.graph_attention import cases, real_graphs
from benchmarks.measure import MODES, Unfit
from case_fast.errors import ConfigError

FAMILY = family_of("graph_attention")


def small_case(relations: int | None = 3, sizes: tuple[int, ...] = (5, 9, 7)) -> cases.GraphCase:
    """Graphs of unequal sizes, so that padding is not the identity."""
    generator = torch.Generator().manual_seed(3)
    parts = [cases.random_graphs(1, size, 3 * size, generator) for size in sizes]
    start = torch.tensor([0, *sizes]).cumsum(0)
    edges = torch.tensor([0, *(part.indices.numel() for part in parts)]).cumsum(0)
    pairs = list(zip(parts, start.tolist(), edges.tolist(), strict=False))
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), *(part.indptr[1:] + edge for part, _, edge in pairs)]).int()
    packed = cases.Graphs(indptr, torch.cat([part.indices + first for part, first, _ in pairs]).int(),
                           torch.cat([part.relation for part in parts]) % 3, start,
                           torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
    return cases.make_case("small", "ragged", packed, relations, dimension=6)


@pytest.mark.parametrize("relations", [3, None])
@pytest.mark.parametrize("peer", FAMILY.quick)
def test_peers_are_right(peer, relations):
    case = small_case(relations)
    try:
        work = FAMILY.peers[peer](case)
    except Unfit as why:
        pytest.skip(str(why))
    expected = FAMILY.truth(case)
    results = {mode: work.pack(work.run(mode)) for mode in MODES}
    assert len(results[MODES[0]]) == 1 and len(results[MODES[1]]) == 1 + len(case.inputs)
    assert all(expected.check(found) <= 1 for found in results.values())


def test_the_truth_by_rows_is_the_whole(monkeypatch):
    case = small_case()
    whole = FAMILY.truth(case)
    monkeypatch.setattr(cases, "_CHUNK", 4)
    for name, part, all_at_once in zip(whole.names, FAMILY.truth(case).values, whole.values, strict=True):
        assert torch.allclose(part, all_at_once, rtol=1e-12, atol=1e-12), name


def test_the_paper_batch():
    case = cases.case_of("paper")
    assert (case.vertices, case.edges, *case.query.shape[1:], case.relation_query.shape[0]) == (1344, 5376, 2, 150, 7)
    rows = torch.arange(1344).repeat_interleave(case.graphs.indptr.diff())
    assert torch.equal(rows // 84, case.graphs.indices // 84)  # no edge leaves its graph
    assert (rows * 1344 + case.graphs.indices).unique().numel() == 5376  # no parallel edges
    assert (case.graphs.indptr.diff() > 0).all()
    assert torch.equal(cases.case_of("paper").query, case.query)


def test_real_graphs_come_back_as_they_were_in_the_store(sample_store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cases.safetensors"
    monkeypatch.setattr(sys, "argv", ["real_graphs", str(sample_store.path), "--out", str(out), "--batches", "2"])
    real_graphs.main()
    assert "2 batches of 16 dialogues" in capsys.readouterr().out
    chosen = torch.randperm(sample_store.size("test"), generator=torch.Generator().manual_seed(0))[:16]
    graphs = real_graphs.graphs_of(sample_store.batch("test", chosen.tolist()))
    assert tuple(graphs) == cases.REAL_KINDS
    for kind in cases.REAL_KINDS:
        read = cases.read_real_graphs(kind, out)
        assert len(read) == 2
        for field in (*cases.FIELDS, "dialogue"):
            assert torch.equal(getattr(read[0], field), getattr(graphs[kind], field)), field
        case = cases.case_of(kind, real=out)
        assert (case.relation is None) == (kind == "concept")


@pytest.mark.parametrize("size", ["", "4", "1e9", "big", "-3", "cognition"])
def test_unknown_sizes(size, tmp_path):
    with pytest.raises(ConfigError, match="missing; make it from a store" if size == "cognition" else "size .* is unknown"):
        cases.case_of(size, real=tmp_path / "none.safetensors")
