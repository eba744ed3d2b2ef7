"""The benchmark of pooled_attention: its peers are right, its cases are what they say."""

from __future__ import annotations

import pytest

from benchmarks.family import family_of
from benchmarks.measure import MODES, Unfit
from benchmarks.pooled_attention import gpu, peers
from benchmarks.pooled_attention.cases import SIZES, by_definition, case_of, truth
from case_fast.errors import ConfigError

FAMILY = family_of("pooled_attention")


@pytest.mark.parametrize("size", ["5x4", "5x4:pool", "7x3:skewed", "1x1"])
@pytest.mark.parametrize("peer", FAMILY.quick)
def test_peers_are_right(peer, size):
    case = case_of(size, heads=3, dimension=6)
    work, expected = FAMILY.peers[peer](case), truth(case)
    for mode in MODES:
        assert work.check(mode, expected) <= 1
        assert len(work.run(mode)) == (1 if mode == MODES[0] else 3 + len(case.weights))


def test_errors_would_stand_out():
    """Outputs and gradients are far above the limits of their errors; one row more or less is seen."""
    case = case_of("9x6", dimension=20)
    expected = truth(case)
    for value, limit in zip(expected.values, expected.limits, strict=True):
        assert value.abs().median() > 30 * limit
    cu = case.cu.clone()
    cu[1:-1] += 1
    shifted = by_definition(case.query, case.rows, cu, case.scale, *case.weights)
    assert (shifted - expected.values[0]).abs().max() > 1e3 * expected.limits[0]


def test_sizes():
    texts = case_of("texts")
    assert texts.shape["s"] == 430 and 2200 < texts.shape["T"] < 2800 and texts.query.shape == (430, 2, 150)
    assert texts.size is None and case_of("64x6").size == 64 and case_of("64x6:pool").size is None
    assert case_of("texts:pool").query.shape == (430, 2, 300) and not case_of("texts:pool").weights
    lengths = case_of("64x6:skewed").lengths
    assert max(lengths) > 3 * sum(lengths) / len(lengths) and min(lengths) >= 1
    assert all(case_of(size).name == size for size in [*SIZES, *gpu.SIZES])
    for wrong in ("", "16", "0x4", "4x0", "4x9:other", "4x9:", "texts:other"):
        with pytest.raises(ConfigError, match="size .* is unknown"):
            case_of(wrong)


def test_padding_that_would_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "MOST_BYTES", 1 << 20)
    with pytest.raises(Unfit, match="needs about"):
        peers.padded(case_of("430x6"), peers._plain)
