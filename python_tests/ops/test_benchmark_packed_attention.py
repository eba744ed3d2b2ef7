"""The benchmark of packed_attention: its peers are right, its cases are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.family import family_of
from benchmarks.measure import MODES, Unfit
from benchmarks.packed_attention import peers
from benchmarks.packed_attention.cases import SIZES, case_of, truth
from case_fast import equations
from case_fast.errors import ConfigError

FAMILY = family_of("packed_attention")
SMALL = ["4x9", "4x9:causal", "5x3:skewed", "1x1"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("peer", FAMILY.quick)
def test_peers_are_right(peer, size):
    case = case_of(size, heads=3, dimension=6)
    try:
        work = FAMILY.peers[peer](case)
    except Unfit as why:
        assert str(why) == "runs on CUDA alone" or case.causal and str(why) == "has no causal mask"
        return
    expected = truth(case)
    for mode in MODES:
        assert work.check(mode, expected) <= 1
        assert len(work.run(mode)) == (1 if mode == MODES[0] else 4)


@pytest.mark.parametrize("size", SMALL)
def test_the_layout_of_torchs_packed_attention(size):
    """Its attention runs on CUDA alone; here ours stands in for it."""
    case = case_of(size, heads=3, dimension=6)

    def attention(query, key, value, cu_query, cu_keys, longest, most, scale, window_size=(-1, -1)):
        assert query.shape[-1] == key.shape[-1] == 8 and cu_query.dtype == cu_keys.dtype == torch.int32
        assert longest == most == cu_query.diff().max()
        causal = {(-1, -1): False, (-1, 0): True}[window_size]
        return equations.packed_attention(query, key, value, cu_query, cu_keys, causal, scale=scale)

    work = peers._varlen(case, attention)
    for mode in MODES:
        assert work.check(mode, truth(case)) <= 1


def test_errors_would_stand_out():
    """Outputs and gradients are far above the limits of their errors; one key more or less is seen."""
    case = case_of("4x9:causal", dimension=20)
    expected = truth(case)
    for value, limit in zip(expected.values, expected.limits, strict=True):
        assert value.abs().median() > 30 * limit
    all_seen = equations.packed_attention(*case.inputs, case.cu, case.cu)
    assert (all_seen - expected.values[0]).abs().max() > 1e3 * expected.limits[0]


def test_sizes():
    contexts = case_of("contexts")
    assert contexts.shape["B"] == 16 and 50 <= min(contexts.lengths) and contexts.shape["longest"] <= 150
    assert contexts.query.shape == (sum(contexts.lengths), 2, 150) and contexts.size is None and not contexts.causal
    assert case_of("replies").causal and case_of("16x64").size == case_of("16x64").query.shape[0]
    assert case_of("64x100:causal").size is None and case_of("64x100:causal").causal
    lengths = case_of("64x100:skewed").lengths
    assert max(lengths) > 3 * sum(lengths) / len(lengths) and min(lengths) >= 1
    assert all(case_of(size).name == size for size in SIZES)
    for wrong in ("", "16", "0x4", "4x0", "4x9:other", "4x9:"):
        with pytest.raises(ConfigError, match="size .* is unknown"):
            case_of(wrong)


def test_padding_that_would_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "MOST_BYTES", 1 << 20)
    with pytest.raises(Unfit, match="needs about"):
        peers.padded(case_of("16x256"), peers._plain)
