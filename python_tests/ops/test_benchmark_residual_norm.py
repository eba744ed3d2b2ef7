"""The benchmark of residual_norm: its peers are right, its cases are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.family import family_of
from benchmarks.measure import BACKWARD, MODES
from benchmarks.residual_norm import gpu
from benchmarks.residual_norm.cases import DROPOUT, QUICK_SIZES, SIZES, case_of, truth
from case_fast.errors import ConfigError

FAMILY = family_of("residual_norm")


@pytest.mark.parametrize("size", QUICK_SIZES)
@pytest.mark.parametrize("peer", FAMILY.peers)
def test_peers_are_right(peer, size):
    torch._dynamo.reset()
    case = case_of(size)
    work, expected = FAMILY.peers[peer](case), truth(case)
    for mode in MODES if "torch.compile" in peer else (*MODES, BACKWARD):
        assert work.check(mode, expected) <= 1
        assert len(work.run(mode)) == (2 if mode == MODES[0] else 2 + len(case.inputs))


@pytest.mark.parametrize("peer", FAMILY.quick)
def test_what_is_timed_drops(peer):
    case = case_of("300x100")
    added = FAMILY.peers[peer](case).run(MODES[0])[0] - case.x
    assert abs((added == 0).double().mean() - DROPOUT) < 0.01


def test_sizes():
    graphs = case_of("graphs")
    assert graphs.shape == {"n": 754, "d": 300} and graphs.size == 754 and len(graphs.inputs) == 4
    norm = case_of("graphs-norm")
    assert norm.update is None and norm.size is None and len(norm.inputs) == 3
    assert all(case_of(size).name == size for size in [*SIZES, *gpu.SIZES])
    for wrong in ("", "16", "0x4", "4x4:other", "4x9:"):
        with pytest.raises(ConfigError, match="size .* is unknown"):
            case_of(wrong)
