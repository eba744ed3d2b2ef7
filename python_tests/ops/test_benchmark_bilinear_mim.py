"""The benchmark of bilinear_mim: its peers are right, its cases are what they say."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import memory
from benchmarks.bilinear_mim import cases, peers
from benchmarks.family import family_of
from benchmarks.measure import MODES, Unfit
from case_fast import cli, equations
from case_fast.errors import ConfigError

FAMILY = family_of("bilinear_mim")


@pytest.mark.parametrize("size", ["24x10", "24", "24:5"])
@pytest.mark.parametrize("peer", FAMILY.quick)
def test_peers_are_right(peer, size):
    case = cases.case_of(size, dimension=20)
    try:
        work = FAMILY.peers[peer](case)
    except Unfit as why:
        assert ("sampled" in str(why)) == (case.negatives is None)
        return
    expected = FAMILY.truth(case)
    assert len(expected.values) == 4 and all(value.abs().max() > 0.05 for value in expected.values)  # far above the limits
    for mode in MODES:
        assert work.check(mode, expected) <= 1


def test_peers_with_more_chunks_and_tiles_than_one(monkeypatch):
    case = cases.case_of("24x10", dimension=20)
    expected = FAMILY.truth(case)
    monkeypatch.setitem(peers._CHUNK, "cpu", 70)
    monkeypatch.setitem(peers._TILE, "cpu", 7)
    assert peers.chunked(case).check(MODES[1], expected) <= 1
    assert peers.one_direction_a_call(case).check(MODES[1], expected) <= 1


@pytest.mark.parametrize("size", ["24x10", "24"])
def test_the_truth_by_parts_is_the_whole(monkeypatch, size):
    case = cases.case_of(size, dimension=20)
    monkeypatch.setitem(cases._AT_ONCE, "cpu", 70)
    leaves = [x.double().requires_grad_() for x in case.inputs]
    loss = equations.bilinear_mim(*leaves, case.positive, reduction="none")
    whole = (loss.detach(), *torch.autograd.grad(loss, leaves, case.grad_out.double()))
    for part, all_at_once in zip(FAMILY.truth(case).values, whole, strict=True):
        assert torch.allclose(part, all_at_once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", ["24x10", "24:5"])
def test_peers_in_half_precision(size):
    """As benchmarks.gpu runs them; on CPU ours computes in float32."""
    case = cases.case_of(size, dtype=torch.bfloat16, dimension=20)
    expected = FAMILY.truth(case)
    for name in FAMILY.quick:
        try:
            work = FAMILY.peers[name](case)
        except Unfit:
            continue
        assert work.check(MODES[1], expected) <= 1, name


def test_sizes(monkeypatch):
    sampled = cases.case_of("sampled")
    assert sampled.shape == {"P": 1280, "Q": 1280, "d": 300, "negatives": 64} and sampled.size is None
    fine = cases.case_of("fine")
    assert fine.scores == (1280, 64) and torch.equal(fine.positive.bincount(), torch.full((64,), 20)) and fine.size is None
    assert cases.case_of("64").size == 64 and cases.case_of("coarse").scores == (16, 16)
    for wrong in ("", "0", "16x", "8x9", "16:0", "1e4", "large"):
        with pytest.raises(ConfigError, match="size .* (is unknown|has more rows of y)"):
            cases.case_of(wrong)
    monkeypatch.setattr(peers, "MOST_BYTES", 8 << 20)
    with pytest.raises(Unfit, match="needs about"):
        peers.usual(cases.case_of("1024"))


def test_a_quick_run_beside_its_yardstick(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    assert cli.main(["bench", "bilinear_mim", "--quick", "--out", str(tmp_path)]) == 0
    assert " x bare matrix products" in capsys.readouterr().out
    results = json.loads((tmp_path / "bilinear_mim.json").read_text())
    assert [case["name"] for case in results["cases"]] == FAMILY.quick_sizes
    assert len(results["summary"]) == 4
    assert not any({"refused", "failed"} & {*row} for case in results["cases"] for row in case["rows"])
