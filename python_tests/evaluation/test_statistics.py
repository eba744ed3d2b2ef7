"""Intervals and tests: closed forms, identical systems, planted differences, and how often they are wrong in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from case_fast.evaluation import statistics as s
from case_fast.evaluation.metrics import distinct_n


def test_an_interval_over_seeds_is_students():
    found = s.over_seeds([36.1, 35.4, 37.0, 36.5, 35.9])
    x = np.array([36.1, 35.4, 37.0, 36.5, 35.9])
    low, high = stats.t.interval(0.95, 4, x.mean(), stats.sem(x))
    assert (found.n, found.mean, found.sd) == (5, pytest.approx(x.mean()), pytest.approx(x.std(ddof=1)))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert s.over_seeds([3.5]) == s.Interval(3.5, 1)
    with pytest.raises(ValueError, match="no value"):
        s.over_seeds([])


def test_intervals_over_seeds_hold_the_truth_as_often_as_they_say():
    """2 000 tables of five seeds: 95 % within 93 to 97."""
    generator = np.random.default_rng(0)
    found = [s.over_seeds(generator.normal(36, 0.4, 5)) for _ in range(2000)]
    assert 0.93 <= np.mean([of.low <= 36 <= of.high for of in found]) <= 0.97


def test_welch_knows_one_seed_and_seeds_that_do_not_vary():
    assert s.welch([1.0], [1.0, 2.0]) is None
    assert s.welch([1.0, 1.0], [1.0, 1.0]) == 1.0 and s.welch([1.0, 1.0], [2.0, 2.0]) == 0.0
    a, b = [36.1, 35.4, 37.0], [35.1, 34.9, 35.2]
    assert s.welch(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)


def conversations(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Replies of each conversation, and a generator's noise for one system's sums."""
    generator = np.random.default_rng(seed)
    weight = generator.integers(1, 4, count).astype(float)
    return weight, weight * generator.normal(3.6, 0.5, count)


def test_identical_systems_differ_by_nothing():
    weight, a = conversations(300)
    assert s.paired_means(a, a, weight, draws=500) == s.Difference(0.0, 1.0, 0.0, 0.0)
    replies = [[["i", "am", "sad"], ["so", "sad"], ["oh"]]]
    assert s.distinct_difference(replies, replies, [0, 0, 1], 1, draws=200) == s.Difference(0.0, 1.0)


def test_the_bootstrap_of_a_mean_is_its_closed_form():
    weight, a = conversations(800)
    b = a + np.random.default_rng(5).normal(0.1, 0.4, 800)
    found = s.paired_means(a, b, np.ones(800))
    d = a - b
    error = d.std() / math.sqrt(800)
    assert found.value == pytest.approx(d.mean())
    assert (found.low, found.high) == (pytest.approx(d.mean() - 1.96 * error, abs=0.1 * error),
                                       pytest.approx(d.mean() + 1.96 * error, abs=0.1 * error))
    assert found == s.paired_means(a, b, np.ones(800))  # the same stream each time


def test_the_permutation_test_is_wrong_as_often_as_it_says():
    """5 % of 2 000 pairs of systems that do not differ: within 4 to 6."""
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(2000):
        a, b = generator.normal(0, 1, (2, 40))
        wrong += s.paired_means(a, b, np.ones(40), draws=400).p < 0.05
    assert 0.04 <= wrong / 2000 <= 0.06


def test_a_planted_gain_in_accuracy_is_found():
    """2 % of 5 255 examples, in 2 544 conversations."""
    generator = np.random.default_rng(2)
    conversation = np.sort(generator.integers(0, 2544, 5255))
    weight = np.bincount(conversation, minlength=2544)
    base = generator.random(5255) < 0.40
    better = base | (generator.random(5255) < 0.034)  # of the wrong ones: 2 % of all
    sums = [np.bincount(conversation, hits, minlength=2544) for hits in (better, base)]
    found = s.paired_means(*sums, weight, draws=2000)
    assert 0.01 < found.value < 0.03 and found.p < 0.01 and 0 < found.low < found.value < found.high


def random_replies(generator: np.random.Generator, count: int, words: int) -> list[list[int]]:
    return [generator.integers(0, words, generator.integers(1, 9)).tolist() for _ in range(count)]


@pytest.mark.parametrize("n", [1, 2])
def test_distinct_differences_are_those_of_the_metric_whoever_changes_places(n):
    generator = np.random.default_rng(3)
    a, b = ([random_replies(generator, 20, words) for _ in range(2)] for words in (15, 40))
    conversation = np.arange(20) // 2
    found = s.distinct_difference(a, b, conversation, n, draws=300)
    expected = np.mean([distinct_n(x, n).value - distinct_n(y, n).value for x, y in zip(a, b, strict=True)])
    assert found.value == pytest.approx(expected) and found.p < 0.05
    other = s.distinct_difference(b, a, conversation, n, draws=300)
    assert other.value == pytest.approx(-expected) and other.p == pytest.approx(found.p)

    # each draw by exchanging lists of words, in plain Python
    drawn = s._stream(2).integers(0, 2, size=(300, 10), dtype=np.int8)
    extreme = 0
    for swaps in drawn.tolist():
        pairs = [[([y[i], x[i]] if swaps[conversation[i]] else [x[i], y[i]]) for i in range(20)]
                 for x, y in zip(a, b, strict=True)]
        differences = [distinct_n([p[0] for p in pair], n).value - distinct_n([p[1] for p in pair], n).value for pair in pairs]
        extreme += abs(np.mean(differences)) >= abs(expected) * (1 - 1e-12)
    assert found.p == (1 + extreme) / 301


def test_distinct_differences_need_the_same_seeds():
    with pytest.raises(ValueError, match="have 2 and 1"):
        s.distinct_difference([[["a"]], [["b"]]], [[["a"]]], [0], 1)


def test_replies_without_words_are_no_error():
    assert s.distinct_difference([[[], []]], [[[], []]], [0, 1], 2, draws=10) == s.Difference(0.0, 1.0)


def test_holm_adjusts_in_order_and_never_falls():
    assert s.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert s.holm({}) == {} and s.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_resampled_sums_are_those_of_lists_drawn_with_replacement():
    sums = np.random.default_rng(0).normal(3, 1, (50, 2))
    found = s.resampled(sums, 1200)
    drawn = s._stream(0).multinomial(50, np.full(50, 1 / 50), size=500)
    assert found.shape == (1200, 2) and found[:500] == pytest.approx(drawn @ sums)
    assert found[:, 0].std() == pytest.approx(sums[:, 0].std() * math.sqrt(50), rel=0.1)


def test_exchanged_sums_belong_to_the_two_systems_together():
    a, b = np.random.default_rng(0).normal(0, 1, (2, 30, 3))
    one, other = s.exchanged(a, b, 700)
    assert one + other == pytest.approx(np.broadcast_to(a.sum(0) + b.sum(0), (700, 3)))
    stays = s._stream(1).integers(0, 2, size=(500, 30), dtype=np.int8)
    assert one[:500] == pytest.approx(stays @ a + (1 - stays) @ b)


def test_halves_of_a_mean_vary_as_its_standard_error():
    x = np.random.default_rng(0).normal(10, 2, 300)
    found = s.scaled(np.array([x[half].mean() for half in s.halves(300, 1000)]), x.mean())
    assert found.std() == pytest.approx(x.std() / math.sqrt(300), rel=0.1)
    low, high = s.about(x.mean(), found)
    assert high - low == pytest.approx(2 * 1.96 * found.std(ddof=1), rel=1e-3)
    assert s.as_far(1.96 * found.std(ddof=1), found) == pytest.approx(0.05, abs=1e-3)
    assert (s.as_far(0.0, np.zeros(5)), s.as_far(1.0, np.zeros(5))) == (1.0, 0.0)
    assert s.scaled(np.zeros(4), 0.0).tolist() == [0.0] * 4


def test_the_interval_of_dist_n_holds_what_is_expected_where_the_bootstrap_does_not():
    """95 % of 120 sets of 80 replies of Zipf's words: within 90 to 99."""
    generator, zipf = np.random.default_rng(3), 1 / np.arange(1, 500)
    sets = [[generator.choice(499, 8, p=zipf / zipf.sum()).tolist() for _ in range(80)] for _ in range(120)]
    values = [distinct_n(replies, 1).value for replies in sets]
    held = boot = 0
    for replies, value in zip(sets, values, strict=True):
        words = np.array(replies)
        parts = [100 * len(np.unique(words[half])) / words[half].size for half in s.halves(80, 100)]
        low, high = s.about(value, s.scaled(np.array(parts), value))
        held += low <= np.mean(values) <= high
        drawn = [100 * len(np.unique(words[generator.integers(0, 80, 80)])) / words.size for _ in range(100)]
        low, high = s.percentiles(np.array(drawn))
        boot += low <= np.mean(values) <= high
    assert 0.90 <= held / 120 <= 0.99 and boot / 120 < 0.2
