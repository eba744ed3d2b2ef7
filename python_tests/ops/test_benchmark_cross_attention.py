"""The benchmark of cross_attention: its peers are right, its cases are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cross_attention import peers
from benchmarks.cross_attention.cases import case_of, make_case, truth
from benchmarks.family import family_of
from benchmarks.measure import MODES, Unfit
from case_fast import equations
from case_fast.errors import ConfigError

FAMILY = family_of("cross_attention")
RAGGED = make_case("small", "training", [3, 1, 7], [[4, 2, 9], [1, 5, 3], [2, 2, 2]], width=12, heads=2)
WITHOUT = make_case("small", "training, some without keys", [3, 2], [[4, 0], [0, 3], [0, 0]], width=12, heads=2)
STEP = make_case("small", "one word", [1, 1, 1], [[4, 2, 9], [1, 5, 3], [2, 2, 2]], True, width=12, heads=2)
BEAMS = make_case("small", "beams", [3, 3], [[4, 2], [1, 5]], True, width=12, heads=2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", [RAGGED, WITHOUT, STEP, BEAMS], ids=lambda case: case.what)
@pytest.mark.parametrize("peer", FAMILY.quick)
def test_peers_are_right(peer, case):
    expected = truth(case)
    for mode in case.modes:
        try:
            work = FAMILY.peers[peer](case)
        except Unfit as why:
            pytest.skip(str(why))
        assert work.check(mode, expected) <= 1
        assert len(work.run(mode)) == (1 if mode == MODES[0] else 1 + len(case.inputs))


@pytest.mark.parametrize("case", [RAGGED, WITHOUT, STEP, BEAMS], ids=lambda case: case.what)
def test_the_layout_of_torchs_packed_attention(case):
    """Its attention runs on CUDA alone; here ours stands in for it."""

    def attention(query, key, value, cu_query, cu_keys, longest, most, scale):
        assert query.shape[-1] == key.shape[-1] == 8 and cu_query.dtype == cu_keys.dtype == torch.int32
        assert longest == cu_query.diff().max() and most == max(1, cu_keys.diff().max())
        return equations.packed_attention(query, key, value, cu_query, cu_keys, scale=scale)

    with pytest.raises(Unfit, match="runs on CUDA alone"):
        peers.varlen(case)
    work = peers._varlen(case, attention)
    for mode in case.modes:
        assert work.check(mode, truth(case)) <= 1


def test_a_step_is_not_trained_and_words_of_training_are_counted():
    assert case_of("step3").modes == MODES[:1] and case_of("rows64").modes == MODES
    for total in (16, 64, 1000):
        case = case_of(f"rows{total}")
        assert case.hidden.shape[0] == case.size == total
    assert case_of("beams4x5").cu_hidden.tolist() == [0, 5, 10, 15, 20] and case_of("step3").size is None
    assert case_of("keys0").sources[0].key.shape == (0, 2, 150)
    lengths = case_of("ragged").cu_hidden.diff()
    assert lengths.max() > 3 * lengths.double().mean() and lengths.min() >= 1


@pytest.mark.parametrize("size", ["", "rows", "rows0", "step", "other"])
def test_an_unknown_size_is_refused(size):
    with pytest.raises(ConfigError, match="cross_attention has no case"):
        case_of(size)


def test_keys_and_values_are_projections_of_the_memory():
    for source, memory, weights in zip(STEP.sources, STEP.memory, STEP.projections, strict=True):
        for found, weight in zip((source.key, source.value), weights, strict=True):
            torch.testing.assert_close(found.flatten(1), memory @ weight.T)
