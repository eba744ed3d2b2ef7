"""The command that compares the ways to decode: it finds agreement, and it finds what does not agree."""

from __future__ import annotations

import decoding_checks as checks
import pytest
import torch
from decoding_checks import compare, deciding_gap
from helpers import random_batch, tiny_model

from case_fast.data.vocabulary import EOS
from case_fast.generation import Generated, GenerationConfig

CONFIGS = [GenerationConfig(max_words=9), GenerationConfig("beam", beams=3, max_words=9)]


def lively_model() -> torch.nn.Module:
    model = tiny_model(3).eval()
    with torch.no_grad():
        model.output.weight *= 4
        model.output.bias[EOS] += 1.0
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.strategy)
def test_all_ways_agree(config):
    batches = [random_batch(9, seed) for seed in (1, 2)]
    for pair, tally in compare(lively_model(), batches, config).items():
        assert tally.contexts == 18 and len(tally.distinct) > 5 and tally.holds and not tally.gaps, pair


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.strategy)
def test_a_cache_that_forgets_is_found(monkeypatch, config):
    """Hypotheses that are not reordered, keys that stay 0."""
    from case_fast.models.layers import DecoderState

    append = DecoderState.append
    monkeypatch.setattr(DecoderState, "append", lambda self, layer, key, value: append(self, layer, key * 0, value))
    found = compare(lively_model(), [random_batch(12, 1)], config)
    tally = found["fused, cached", "fused, uncached"]
    assert not tally.holds and max(tally.gaps) > checks.GAP
    assert found["fused, cached", "plain, cached"].holds  # both forget


def test_the_deciding_gap_is_that_of_the_first_difference():
    scores = {(5,): -1.0, (6,): -1.5, (7,): -1.50004, (5, 8): -3.0, (6, 8): -9.0}
    traces = ({0: {(1,)}, 1: {(1, 5), (1, 6)}, 2: {(1, 5, 8)}}, {0: {(1,)}, 1: {(1, 5), (1, 7)}, 2: {(1, 6, 8)}})
    replies = (Generated((5, 8), 0.0, "length"), Generated((6, 8), 0.0, "length"))
    assert deciding_gap(scores.__getitem__, replies, traces, CONFIGS[1]) == pytest.approx(4e-5)
    same = (traces[0], traces[0])
    assert deciding_gap(scores.__getitem__, replies, same, CONFIGS[1]) == pytest.approx(3.0)
    assert deciding_gap(scores.__getitem__, replies, same, CONFIGS[0]) == pytest.approx(6.0)
