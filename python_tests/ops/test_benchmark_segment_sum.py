"""The benchmark of segment_sum: its peers are right, its cases are what they say."""

from __future__ import annotations

import pytest

from benchmarks.family import family_of
from benchmarks.measure import MODES
from benchmarks.segment_sum import gpu
from benchmarks.segment_sum.cases import QUICK_SIZES, SIZES, case_of, truth
from case_fast.errors import ConfigError
from case_fast.ops import reference

FAMILY = family_of("segment_sum")


@pytest.mark.parametrize("size", QUICK_SIZES)
@pytest.mark.parametrize("peer", FAMILY.peers)
def test_peers_are_right(peer, size):
    case = case_of(size)
    work, expected = FAMILY.peers[peer](case), truth(case)
    for mode in MODES:
        assert work.check(mode, expected) <= 1
        assert len(work.run(mode)) == (1 if mode == MODES[0] else 2)


def test_errors_would_stand_out():
    """Sums and gradients are far above the limits of their errors; one row more or less is seen."""
    case = case_of("30x7:5")
    expected = truth(case)
    for value, limit in zip(expected.values, expected.limits, strict=True):
        assert value.abs().median() > 30 * limit
    less = reference.segment_sum(case.x[1:], case.segment[1:], 5)
    assert (less - expected.values[0]).abs().max() > 1e3 * expected.limits[0]


def test_sizes():
    texts = case_of("texts")
    assert texts.shape == {"n": 754, "segments": 430, "d": 300} and texts.size == 754
    assert (texts.segment.diff() >= 0).all() and (case_of("context").segment.diff() < 0).any()
    assert case_of("targets").x.shape == (233,) and case_of("targets").size is None
    assert all(case_of(size).name == size for size in [*SIZES, *gpu.SIZES])
    for wrong in ("", "16", "0x4:1", "4x4", "4x9:5:other", "4x9:"):
        with pytest.raises(ConfigError, match="size .* is unknown"):
            case_of(wrong)
