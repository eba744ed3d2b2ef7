"""The benchmark of linear: its peers are right, its cases are what they say."""

from __future__ import annotations

import pytest

from benchmarks.family import family_of
from benchmarks.linear import gpu
from benchmarks.linear.cases import QUICK_SIZES, SIZES, case_of, truth
from benchmarks.measure import MODES, Unfit, prepared
from case_fast.errors import ConfigError

FAMILY = family_of("linear")


@pytest.mark.parametrize("size", [*QUICK_SIZES, "9x5:4:relu", "9x5:4:tanh"])
@pytest.mark.parametrize("peer", FAMILY.quick)
@pytest.mark.parametrize("mode", MODES)
def test_peers_are_right(peer, size, mode):
    case = case_of(size)
    try:
        work = prepared(FAMILY.peers[peer], case, mode)
    except Unfit:
        assert ("each weight" in peer and len(case.weights) == 1 or "oneDNN" in peer and mode != MODES[0]
                or "bfloat16" in peer and case.precision == "highest")
        return
    assert work.check(mode, truth(case)) <= 1


def test_errors_would_stand_out():
    """Results and gradients are far above the limits of their errors."""
    expected = truth(case_of("16x40:9+5:gelu"))
    assert len(expected.values) == len(expected.names) == 5
    for value, limit in zip(expected.values, expected.limits, strict=True):
        assert value.abs().median() > 30 * limit


def test_sizes():
    wide = case_of("wide")
    assert wide.shape == {"n": 2400, "K": 300, "N": 600, "weights": 1} and wide.activation == "gelu" and wide.size is None
    assert case_of("query-key-value").shape["weights"] == 3 and case_of("projection").size == 750
    assert case_of("projection").needs("forward") == {"flop": 2 * 750 * 300 * 300, "bytes": 4 * 300 * (300 + 2 * 750)}
    assert all(case_of(size).name == size for size in [*SIZES, *gpu.SIZES])
    for wrong in ("", "16", "0x4:1", "4x4", "4x9:5:silu", "4x9:", "4x9:5+"):
        with pytest.raises(ConfigError, match="size .* is unknown"):
            case_of(wrong)
