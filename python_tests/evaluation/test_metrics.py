"""Metrics against values worked out by hand, and what they do where no value exists."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from case_fast import __version__
from case_fast.evaluation import metrics as m

LN2 = math.log(2)


def test_the_three_perplexities_weigh_long_replies_differently():
    nll = [[LN2, LN2, LN2], [3 * LN2]]  # three tokens at 1/2, one at 1/8
    token, geometric, response = m.perplexities(nll, 10)
    assert [metric.name for metric in (token, geometric, response)] == ["ppl", "ppl_geometric", "ppl_response"]
    assert token.value == pytest.approx(2 ** (6 / 4))
    assert geometric.value == pytest.approx(2 ** ((1 + 3) / 2)) == pytest.approx((2 * 8) ** 0.5)
    assert response.value == pytest.approx((2 + 8) / 2)
    assert (token.count, geometric.count, response.count) == (4, 2, 2)
    assert token.better == geometric.better == response.better == "lower"


def test_a_uniform_model_has_the_vocabulary_size_as_perplexity():
    nll = [[math.log(50)] * n for n in (1, 7, 3)]
    assert [metric.value for metric in m.perplexities(nll)] == pytest.approx([50, 50, 50])


def test_perplexity_takes_arrays_and_sums_in_double():
    nll = [np.full(100_000, 0.1, dtype=np.float32), np.array([0.3], dtype=np.float32)]
    exact = math.exp((100_000 * float(np.float32(0.1)) + float(np.float32(0.3))) / 100_001)
    assert m.perplexity(nll).value == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(
    "nll, reason",
    [
        ([], "no"),
        ([[]], "no"),
        ([[1.0, math.nan]], "not finite"),
        ([[math.inf], [1.0]], "not finite"),
        ([[800.0]], "too large for exp"),
    ],
)
@pytest.mark.parametrize("function", [m.perplexity, m.geometric_perplexity, m.response_perplexity])
def test_perplexity_without_a_value_says_why(function, nll, reason):
    metric = function(nll)
    assert metric.value is None and reason in metric.reason and metric.text == "n/a"


def test_an_empty_row_is_no_response():
    for metric in m.perplexities([[], [LN2]]):
        assert metric.value == pytest.approx(2) and metric.count == 1


def test_distinct_n_counts_within_replies_only():
    replies = [["a", "b"], ["b", "a"], ["a", "b"]]
    one, two = m.distinct_n(replies, 1), m.distinct_n(replies, 2)
    assert (one.value, one.count) == (pytest.approx(100 * 2 / 6), 6)
    assert (two.value, two.count) == (pytest.approx(100 * 2 / 3), 3)  # b-b and a-a across replies would make 4 of 5
    three = m.distinct_n(replies, 3)
    assert three.value is None and three.count == 0 and three.reason == "no reply has 3 words"


def test_distinct_n_of_hand_counted_ids():
    replies = [[1, 2, 1, 2, 3], [], [3], [1, 2]]
    assert m.distinct_n(replies, 1).value == pytest.approx(100 * 3 / 8)
    assert m.distinct_n(replies, 2).value == pytest.approx(100 * 3 / 5)  # 12 21 12 23 | 12
    assert m.distinct_n(replies, 3).value == pytest.approx(100 * 3 / 3)


@pytest.mark.parametrize("replies", [[], [[]], [[], []]])
def test_replies_without_words(replies):
    assert m.distinct_n(replies, 1).reason == "no reply has 1 word"
    assert m.reply_words(replies).value == (0 if replies else None)
    assert m.distinct_replies(replies).value == (1 if replies else None)


def test_distinct_n_refuses_no_words_at_a_time():
    with pytest.raises(ValueError, match="at least 1"):
        m.distinct_n([["a"]], 0)


def test_reply_counts():
    replies = [["a"], ["a", "b"], ["a"], [], []]
    assert m.distinct_replies(replies).value == 3 and m.distinct_replies(replies).text == "3"
    assert m.reply_words(replies).value == pytest.approx(4 / 5)
    assert m.unknown_rate([[1, 5, 1], [], [7]], 1).value == pytest.approx(2 / 4)
    assert m.unknown_rate([[]], 1).value is None


def test_emotion_accuracy_by_hand():
    scores = np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.2, 0.5, 0.3]])
    labels = [0, 0, 2, 1]
    assert m.emotion_accuracy(scores, labels, 1).value == pytest.approx(2 / 4)
    assert m.emotion_accuracy(scores, labels, 2).value == pytest.approx(2 / 4)
    assert m.emotion_accuracy(scores, labels, 3).value == 1
    assert m.emotion_accuracy(scores, labels, 9).value == 1
    assert m.emotion_accuracy(scores, [-1, -1, 2, 1], 1).value == pytest.approx(1 / 2)
    assert m.emotion_accuracy(scores, [-1, -1, 2, 1], 1).count == 2


def test_ties_go_to_the_lower_label():
    scores = np.zeros((4, 4))
    assert m.rank_emotions(scores).tolist() == [[0, 1, 2, 3]] * 4
    assert m.emotion_accuracy(scores, [0, 1, 2, 3], 1).value == pytest.approx(1 / 4)
    assert m.emotion_accuracy(scores, [0, 1, 2, 3], 2).value == pytest.approx(2 / 4)
    scores[:, 3] = 1
    assert m.rank_emotions(scores)[0].tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("k", [1, 5])
def test_emotion_accuracy_agrees_with_scikit_learn(k):
    random = np.random.default_rng(k)
    scores, labels = random.normal(size=(500, 32)), random.integers(32, size=500)
    expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(32))
    assert m.emotion_accuracy(scores, labels, k).value == pytest.approx(expected)


def test_emotion_accuracy_without_a_value_says_why():
    assert m.emotion_accuracy(np.zeros((0, 32)), []).reason == "no example has an emotion label"
    assert m.emotion_accuracy(np.zeros((2, 3)), [-1, -1]).value is None
    broken = m.emotion_accuracy(np.array([[0, math.nan], [0, 1]]), [0, 1])
    assert broken.value is None and "1 of 2" in broken.reason


def test_confusion_counts():
    counts = m.emotion_confusion([0, 0, 2, -1], [0, 1, 2, 2], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert m.emotion_confusion([-1], [0], 3).tolist() == [[0] * 3] * 3
    with pytest.raises(ValueError):
        m.emotion_confusion([0, 1], [0], 3)


def test_signatures_name_what_changes_a_value():
    nll = [[1.0]]
    assert m.perplexity(nll, 1397).signature == (
        f"ppl|tokens=words+eos|unk=counted|weight=token|vocabulary=1397|case_fast={__version__}"
    )
    assert m.perplexity(nll, 5).signature != m.perplexity(nll, 6).signature
    assert "decoding=greedy" in m.distinct_n([["a"]], 2, "greedy").signature
    found = {metric.signature for metric in (*m.perplexities(nll), m.distinct_n([], 1), m.distinct_n([], 2))}
    assert len(found) == 5


def test_values_as_text():
    values = (None, 1234, 35.3749, 0.402, 12345.6)
    assert [m.format_value(value) for value in values] == ["n/a", "1,234", "35.37", "0.402", "12,345.60"]
