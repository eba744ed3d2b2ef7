"""The benchmark of linear_cross_entropy: its peers are right, its cases are what they say."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from benchmarks import memory
from benchmarks.family import family_of
from benchmarks.linear_cross_entropy import cases, peers
from benchmarks.linear_cross_entropy.cases import case_of, truth
from benchmarks.measure import MODES, Unfit, WrongResult
from case_fast import cli, equations
from case_fast.errors import ConfigError

FAMILY = family_of("linear_cross_entropy")
SMALL = ["30x200", "30x200:recomputed", "9x200:bow", "7x200:top1", "7x200:top5"]


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("peer", FAMILY.quick)
def test_peers_are_right(peer, size):
    case = case_of(size, dimension=20)
    try:
        work = FAMILY.peers[peer](case)
    except Unfit as why:
        assert str(why) in ("is a loss", "decodes", "has one target a row", "has a backward pass", "is not in this torch")
        return
    expected = truth(case)
    for mode in case.modes:
        assert work.check(mode, expected) <= 1
        results = work.run(mode)
        if results and case.best is None:
            assert len(results) == (1 if mode == MODES[0] else 4)


def test_errors_would_stand_out():
    """Loss and gradients are far above the limits of their errors."""
    for size in SMALL[:3]:
        expected = truth(case_of(size, dimension=20))
        assert len(expected.values) == 4
        for value, limit in zip(expected.values, expected.limits, strict=True):
            assert value.abs().median() > 30 * limit
    best = truth(case_of("7x200:top5", dimension=20))
    assert best.limits[1] < 0.5  # one word for another is wrong


@pytest.mark.parametrize("wrong, named", [
    (lambda nll, target: nll * 1.001, "loss is off"),
    (lambda nll, target: torch.where(target == target[0], nll.detach(), nll), "grad_hidden is off"),
], ids=["scaled", "gradient"])
def test_a_wrong_peer_is_refused(wrong, named):
    case = case_of("30x200", dimension=20)
    work = peers.one_nll(case)

    def loss(hidden, weight, bias):
        return (peers._share(case) * wrong(peers._nll(hidden, weight, bias, case.target, None), case.target)).sum()

    work.function = loss
    with pytest.raises(WrongResult, match=named):
        work.check(MODES[1], truth(case))


@pytest.mark.parametrize("size", ["30x200", "9x200:bow"])
def test_peers_with_more_chunks_than_one(monkeypatch, size):
    case = case_of(size, dimension=20)
    expected = truth(case)
    monkeypatch.setitem(peers._CHUNK, "cpu", 7 * 200 if size == "30x200" else 2 * 200)
    assert peers.chunked(case).check(MODES[1], expected) <= 1
    if case.cu_target is None:
        assert peers.of_torch(case).check(MODES[1], expected) <= 1


@pytest.mark.parametrize("size", ["30x200", "9x200:bow", "7x200:top5"])
def test_the_truth_by_parts_is_the_whole(monkeypatch, size):
    case = case_of(size, dimension=20)
    whole = truth(case)
    monkeypatch.setitem(cases._AT_ONCE, "cpu", 4 * 200)
    for part, all_at_once in zip(truth(case).values, whole.values, strict=True):
        assert torch.allclose(part, all_at_once, rtol=1e-12, atol=1e-12)


def test_the_loss_is_both_losses_of_the_equations():
    case = case_of("30x200", dimension=20)
    nll, _ = equations.linear_cross_entropy(*(x.double() for x in case.inputs), case.target)
    loss = cases.GENERATION * equations.generation_loss(nll, 1 / nll.numel())
    loss += cases.DIVERSITY * equations.diversity_loss(nll, case.target, case.word_weight, 1 / nll.numel())
    assert torch.allclose(truth(case).values[0], loss)
    assert case.word_weight.mean() == pytest.approx(1) and case.word_weight[0] == 0 and case.target.unique().numel() < 30


@pytest.mark.parametrize("size", ["30x200", "9x200:bow"])
def test_peers_in_half_precision(size):
    """As benchmarks.gpu runs them; on CPU ours computes in float32."""
    case = case_of(size, dtype=torch.bfloat16, dimension=20)
    expected = truth(case)
    for name in FAMILY.quick:
        try:
            work = FAMILY.peers[name](case)
        except Unfit:
            continue
        assert work.check(MODES[1], expected) <= 1, name


def test_sizes():
    step = case_of("48x2400")
    assert step.shape == {"T": 48, "V": 2400, "d": 300} and step.size is None and step.cu_target is None
    assert case_of("16x24000").size == 16 and case_of("16x24000").keep_bytes == 64 << 20
    recomputed = case_of("16x24000:recomputed")
    assert recomputed.keep_bytes == 0 and recomputed.size is None and recomputed.modes == MODES
    bag = case_of("bow16")
    assert bag.hidden.shape[0] == 16 and bag.cu_target.shape == (17,) and 200 < bag.target.numel() < 350
    best = case_of("3x100:top7")
    assert best.best == 7 and best.modes == MODES[:1] and best.shape["k"] == 7
    for wrong in ("", "480", "0x9", "4x0", "4x9:top10", "4x9:top0", "4x9:other", "bow", "4x9:"):
        with pytest.raises(ConfigError, match="size .* is unknown"):
            case_of(wrong)


def test_memory_of_the_most_probable_words():
    if not memory.measurable():
        pytest.skip("needs Linux")
    work = peers.ours(case_of("7x2000:top5", dimension=20))
    assert len(work.run(MODES[0])) == 2 and memory.extra_bytes(lambda: work.run(MODES[0])) < 10e6


def test_a_quick_run_beside_its_yardsticks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "measurable", lambda: False)
    small = ["16x2400", "16x300:bow", "16x300:top5"]
    assert cli.main(["bench", "linear_cross_entropy", "--quick", "--sizes", ",".join(small), "--out", str(tmp_path)]) == 0
    assert f" x {peers.THREE}" in capsys.readouterr().out
    results = json.loads((tmp_path / "linear_cross_entropy.json").read_text())
    assert results["environment"]["backend"] == "native"
    assert [case["name"] for case in results["cases"]] == small
    assert len(results["summary"]) == 5
    assert not any({"refused", "failed"} & {*row} for case in results["cases"] for row in case["rows"])
    with Image.open(tmp_path / "linear_cross_entropy.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((60, 30)).tobytes())) > 5
