"""The benchmarks: nothing is timed that was not found right, and what a run writes can be read again."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import case_fast
from benchmarks import bilinear_mim, graph_attention, graphs, measure, memory, pairs, real_graphs, report
from benchmarks.graph_attention_peers import PEERS, QUICK
from benchmarks.measure import MODES, OURS, Truth, Unfit, Work, WrongResult, Yardstick
from benchmarks.run import family_of, run
from case_fast import cli, equations
from case_fast.errors import CaseFastError, ConfigError

ROOT = Path(case_fast.__file__).parents[1]


def small_case(relations: int | None = 3, sizes: tuple[int, ...] = (5, 9, 7)) -> graphs.GraphCase:
    """Graphs of unequal sizes, so that padding is not the identity."""
    generator = torch.Generator().manual_seed(3)
    parts = [graphs.random_graphs(1, size, 3 * size, generator) for size in sizes]
    start = torch.tensor([0, *sizes]).cumsum(0)
    edges = torch.tensor([0, *(part.indices.numel() for part in parts)]).cumsum(0)
    pairs = list(zip(parts, start.tolist(), edges.tolist(), strict=False))
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), *(part.indptr[1:] + edge for part, _, edge in pairs)]).int()
    packed = graphs.Graphs(indptr, torch.cat([part.indices + first for part, first, _ in pairs]).int(),
                           torch.cat([part.relation for part in parts]) % 3, start,
                           torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
    return graphs.make_case("small", "ragged", packed, relations, dimension=6)


def broken(of: str, how) -> object:
    """The peer with its output passed through ``how``."""
    whole = PEERS[of]

    def prepare(case: graphs.GraphCase) -> Work:
        work = whole(case)
        right = work.function
        work.function = lambda *leaves: how(right(*leaves))
        return work

    return prepare


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


# ---- the peers


@pytest.mark.parametrize("relations", [3, None])
@pytest.mark.parametrize("peer", QUICK)
def test_peers_are_right(peer, relations):
    case = small_case(relations)
    try:
        work = PEERS[peer](case)
    except Unfit as why:
        pytest.skip(str(why))
    expected = graph_attention.truth(case)
    results = {mode: work.pack(work.run(mode)) for mode in MODES}
    assert len(results[MODES[0]]) == 1 and len(results[MODES[1]]) == 1 + len(case.inputs)
    assert all(expected.check(found) <= 1 for found in results.values())


def test_the_truth_by_rows_is_the_whole(monkeypatch):
    case = small_case()
    whole = graph_attention.truth(case)
    monkeypatch.setattr(graph_attention, "_CHUNK", 4)
    for name, part, all_at_once in zip(whole.names, graph_attention.truth(case).values, whole.values, strict=True):
        assert torch.allclose(part, all_at_once, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("how, mode, named", [
    (lambda out: out * 1.001, "forward", "out is off by"),
    (lambda out: out[:, :, :1], "forward", "out has shape"),
    (lambda out: torch.where(out == out.max(), torch.nan, out), "forward+backward", "out is off by nan"),
    (WrongBackward.apply, "forward+backward", "grad_query is off by"),
], ids=["scaled", "shape", "nan", "gradient"])
def test_a_wrong_peer_is_refused_before_it_is_timed(monkeypatch, how, mode, named):
    case = small_case()
    work = broken("equations.py, eager", how)(case)
    monkeypatch.setattr(measure, "seconds", lambda *_: pytest.fail("a wrong peer was timed"))
    with pytest.raises(WrongResult, match=named):
        measure.tune(work, mode, graph_attention.truth(case), [1])


def test_a_refused_peer_has_no_time_and_is_no_rival(monkeypatch):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    eager = "equations.py, eager"
    peers = {OURS: PEERS[OURS], "right": PEERS[eager], "wrong": broken(eager, lambda out: out + 1)}
    (case,) = run(replace(graph_attention.FAMILY, peers=peers, quick=[*peers]), ["8"], quick=True)
    rows = {(row["peer"], row["mode"]): row for row in case["rows"]}
    for mode in MODES:
        assert "refused" in rows["wrong", mode] and "median_ms" not in rows["wrong", mode]
        assert rows["right", mode]["median_ms"] > 0
    assert [line["best_peer"] for line in report.summary(case)] == ["right", "right"]
    assert "wrong: out is off by" in report.markdown("graph_attention", report.environment("graph_attention"), [case])


def test_a_yardstick_is_timed_and_is_no_rival(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    calls: list[str] = []
    ruler = Yardstick({mode: lambda mode=mode: calls.append(mode) for mode in MODES})
    peers = {OURS: PEERS[OURS], "a ruler": lambda case: ruler, "right": PEERS["equations.py, eager"]}
    (case,) = run(replace(graph_attention.FAMILY, peers=peers, quick=[*peers]), ["8"], quick=True)
    assert set(calls) == set(MODES)
    rows = {(row["peer"], row["mode"]): row for row in case["rows"]}
    for line in report.summary(case):
        assert line["best_peer"] == "right"
        assert line["in_yardsticks"]["a ruler"] == line["ours_ms"] / rows["a ruler", line["mode"]]["median_ms"]
    paths = report.write("graph_attention", report.environment("graph_attention"), [case], tmp_path)
    table = paths[1].read_text()
    assert "| case_fast / a ruler |" in table and "| *a ruler* |" in table


def test_nothing_is_written_when_we_are_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PEERS, OURS, broken(OURS, lambda out: out * 1.01))
    assert cli.main(["bench", "graph_attention", "--quick", "--sizes", "8", "--out", str(tmp_path / "out")]) == 1
    assert "our own result is wrong" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_limits_follow_the_error_of_plain_torch():
    exact, plain = torch.tensor([1.0, 300.0]).double(), torch.tensor([1.0, 300.5])
    truth = Truth.of(["out"], [exact], [plain])
    assert truth.limits == (pytest.approx(measure.SLACK * 0.5 + 3e-3),)
    assert truth.check((torch.tensor([1.0, 301.9]),)) < 1
    with pytest.raises(WrongResult, match="out is off by 2.1"):
        truth.check((torch.tensor([1.0, 302.1]),))


# ---- bilinear_mim


@pytest.mark.parametrize("size", ["24x10", "24", "24:5"])
@pytest.mark.parametrize("peer", bilinear_mim.FAMILY.quick)
def test_mim_peers_are_right(peer, size):
    case = pairs.case_of(size, dimension=20)
    try:
        work = bilinear_mim.FAMILY.peers[peer](case)
    except Unfit as why:
        assert ("sampled" in str(why)) == (case.negatives is None)
        return
    expected = bilinear_mim.truth(case)
    assert len(expected.values) == 4 and all(value.abs().max() > 0.05 for value in expected.values)  # far above the limits
    for mode in MODES:
        assert work.check(mode, expected) <= 1


def test_mim_peers_with_more_chunks_and_tiles_than_one(monkeypatch):
    from benchmarks import bilinear_mim_peers as peers

    case = pairs.case_of("24x10", dimension=20)
    expected = bilinear_mim.truth(case)
    monkeypatch.setitem(peers._CHUNK, "cpu", 70)
    monkeypatch.setitem(peers._TILE, "cpu", 7)
    assert peers.chunked(case).check(MODES[1], expected) <= 1
    assert peers.one_direction_a_call(case).check(MODES[1], expected) <= 1


@pytest.mark.parametrize("size", ["24x10", "24"])
def test_the_truth_of_mim_by_parts_is_the_whole(monkeypatch, size):
    case = pairs.case_of(size, dimension=20)
    monkeypatch.setitem(bilinear_mim._AT_ONCE, "cpu", 70)
    leaves = [x.double().requires_grad_() for x in case.inputs]
    loss = equations.bilinear_mim(*leaves, case.positive, reduction="none")
    whole = (loss.detach(), *torch.autograd.grad(loss, leaves, case.grad_out.double()))
    for part, all_at_once in zip(bilinear_mim.truth(case).values, whole, strict=True):
        assert torch.allclose(part, all_at_once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", ["24x10", "24:5"])
def test_mim_peers_in_half_precision(size):
    """As benchmarks.gpu runs them; on CPU ours computes in float32."""
    case = pairs.case_of(size, dtype=torch.bfloat16, dimension=20)
    expected = bilinear_mim.truth(case)
    for name in bilinear_mim.FAMILY.quick:
        try:
            work = bilinear_mim.FAMILY.peers[name](case)
        except Unfit:
            continue
        assert work.check(MODES[1], expected) <= 1, name


def test_what_runs_on_a_gpu_is_known():
    from benchmarks.gpu import on_gpu

    for name, chosen in on_gpu().items():
        family = family_of(name)
        assert chosen.ours and set(chosen.peers) < set(family.peers)
        for switch in chosen.ours.values():
            with switch():
                pass
        assert all(family.case_of(size).name == size for size in chosen.sizes if size != "1e5")


def test_mim_sizes(monkeypatch):
    sampled = pairs.case_of("sampled")
    assert sampled.shape == {"P": 1280, "Q": 1280, "d": 300, "negatives": 64} and sampled.size is None
    fine = pairs.case_of("fine")
    assert fine.scores == (1280, 64) and torch.equal(fine.positive.bincount(), torch.full((64,), 20)) and fine.size is None
    assert pairs.case_of("64").size == 64 and pairs.case_of("coarse").scores == (16, 16)
    for wrong in ("", "0", "16x", "8x9", "16:0", "1e4", "large"):
        with pytest.raises(ConfigError, match="size .* (is unknown|has more rows of y)"):
            pairs.case_of(wrong)
    from benchmarks import bilinear_mim_peers as peers

    monkeypatch.setattr(peers, "MOST_BYTES", 8 << 20)
    with pytest.raises(Unfit, match="needs about"):
        peers.usual(pairs.case_of("1024"))


def test_a_quick_run_of_mim_beside_its_yardstick(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    assert cli.main(["bench", "bilinear_mim", "--quick", "--out", str(tmp_path)]) == 0
    assert " x bare matrix products" in capsys.readouterr().out
    results = json.loads((tmp_path / "bilinear_mim.json").read_text())
    assert [case["name"] for case in results["cases"]] == bilinear_mim.FAMILY.quick_sizes
    assert len(results["summary"]) == 4 and not any("refused" in row for case in results["cases"] for row in case["rows"])


# ---- the inputs


def test_the_paper_batch():
    case = graphs.case_of("paper")
    assert (case.vertices, case.edges, *case.query.shape[1:], case.relation_query.shape[0]) == (1344, 5376, 2, 150, 7)
    rows = torch.arange(1344).repeat_interleave(case.graphs.indptr.diff())
    assert torch.equal(rows // 84, case.graphs.indices // 84)  # no edge leaves its graph
    assert (rows * 1344 + case.graphs.indices).unique().numel() == 5376  # no parallel edges
    assert (case.graphs.indptr.diff() > 0).all()
    assert torch.equal(graphs.case_of("paper").query, case.query)


def test_real_graphs_come_back_as_they_were_in_the_store(sample_store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "graphs.safetensors"
    monkeypatch.setattr(sys, "argv", ["real_graphs", str(sample_store.path), "--out", str(out), "--batches", "2"])
    real_graphs.main()
    assert "2 batches of 16 dialogues" in capsys.readouterr().out
    chosen = torch.randperm(sample_store.size("test"), generator=torch.Generator().manual_seed(0))[:16]
    batch = sample_store.batch("test", chosen.tolist())
    for kind in graphs.REAL_KINDS:
        read = graphs.read_real_graphs(kind, out)
        assert len(read) == 2
        for field in (*graphs.FIELDS, "dialogue"):
            assert torch.equal(getattr(read[0], field), getattr(getattr(batch, kind), field)), field
        case = graphs.case_of(kind, real=out)
        assert (case.relation is None) == (kind == "concept")


@pytest.mark.parametrize("size", ["", "4", "1e9", "big", "-3", "cognition"])
def test_unknown_sizes(size, tmp_path):
    with pytest.raises(ConfigError, match="missing; make it from a store" if size == "cognition" else "size .* is unknown"):
        graphs.case_of(size, real=tmp_path / "none.safetensors")


# ---- the measuring


def test_memory_sees_what_is_freed_again():
    if not memory.measurable():
        pytest.skip("needs Linux")
    kept = torch.ones(8 << 20)
    seen = memory.extra_bytes(lambda: (torch.ones(8 << 20), torch.ones(16 << 20).sum(), kept * 2)[:1])
    assert 60e6 < seen < 110e6  # 64 MiB, freed before the next 32 MiB or not; the 32 MiB that are returned do not count


def test_turns_are_interleaved_and_samples_counted():
    order: list[str] = []
    leaf = torch.ones(1)

    def work(name: str) -> Work:
        return Work(lambda x: (order.append(name), x * 1)[1], (leaf,), leaf)

    ready = {name: (work(name), measure.Timing(1, 0.0, []), taken) for name, taken in (("a", 1.0), ("b", 0.005))}
    others = measure.take_turns(ready, "forward", rounds=7, budget=0.0)
    assert "".join(order) == "abbbb" * 5  # over budget: five rounds; "a" is slow and needs no call to warm up
    assert all(len(timing.samples) == 5 and timing.median >= 0 for _, timing, _ in ready.values())
    assert others is None or others >= 0


# ---- the command


def test_quick_run_writes_what_can_be_read(tmp_path, capsys):
    out = tmp_path / "results"
    assert cli.main(["bench", "graph_attention", "--quick", "--sizes", "40", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" x faster than ") == 2 and "graph_attention.md" in printed
    results = json.loads((out / "graph_attention.json").read_text())
    environment = results["environment"]
    assert environment["quick"] and environment["machine"]["cores"] and environment["versions"]["torch"] == torch.__version__
    assert [case["name"] for case in results["cases"]] == ["40"]
    for case in results["cases"]:
        assert {(row["peer"], row["mode"]) for row in case["rows"]} == {(peer, mode) for peer in QUICK for mode in MODES}
        for row in case["rows"]:
            if "left_out" not in row:
                assert 0 < row["fastest_ms"] <= row["median_ms"] and row["rounds"] == 3 and row["threads"] == 1
                assert row["error_over_limit"] <= 1 and "refused" not in row
                assert not memory.measurable() or row["extra_bytes"] >= 0
    table = (out / "graph_attention.md").read_text()
    assert "quick run" in table and str(ROOT) not in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {7}
    with Image.open(out / "graph_attention.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((60, 30)).tobytes())) > 5


def test_without_a_checkout_the_command_says_so(monkeypatch, tmp_path):
    from case_fast import bench

    monkeypatch.setattr(bench, "_CHECKOUT", tmp_path)
    with pytest.raises(ConfigError, match="not installed with the package"):
        bench.bench("graph_attention", [], True, tmp_path, lambda *_: None)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("data", "results", "__pycache__"))
    with pytest.raises(CaseFastError, match="no benchmark of 'sorting'; one of .*graph_attention"):
        bench.bench("sorting", [], True, tmp_path, lambda *_: None)
