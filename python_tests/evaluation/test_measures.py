"""Measures against values worked out by hand on a file of KEMP's form, and against the libraries that define them."""

from __future__ import annotations

import gzip
import math
import sys

import numpy as np
import pytest
from reply_files import kemp, many

from case_fast.data import EMOTIONS
from case_fast.evaluation import measures as x
from case_fast.evaluation.measures import Sums
from case_fast.evaluation.replies import Reply, read_replies


def made(words: str, reference: str = "", **facts) -> Reply:
    return Reply(("hi",), words, reference, tuple(words.split()), tuple(reference.split()), ("hi",), 1, **facts)


@pytest.fixture
def replies(tmp_path):
    return read_replies(kemp(tmp_path / "KEMP.txt")).replies


def values(measures):
    return {measure.metric.name: measure.metric.value for measure in measures}


def whole(measure):
    """What the rows or parts that intervals are drawn from give for all replies together."""
    spread = measure.spread
    return spread.value(spread.rows.sum(0)) if isinstance(spread, Sums) else spread.value(np.ones(4, dtype=bool))


def test_goldens_of_a_made_file_by_hand(replies):
    """30 words, 26 pairs, 22 triples, 18 of 4."""
    found = values(x.of_replies(replies))
    assert found["dist_1"] == pytest.approx(100 * 18 / 30)
    assert found["dist_2"] == pytest.approx(100 * 19 / 26)
    assert found["dist_3"] == pytest.approx(100 * 16 / 22)
    assert (found["distinct_replies"], found["reply_words"]) == (3, 7.5)
    assert found["repeated_1"] == pytest.approx(100 / 30)  # "is" twice
    assert found["repeated_2"] == found["repeated_3"] == found["repeated_4"] == 0
    assert found["self_repetition"] == pytest.approx(2 * math.log(1 + 5) / 4)  # two replies of five 4-grams that are equal
    assert found["common_replies"] == 100
    text = "\n".join(" ".join(reply.words) for reply in replies).encode()
    assert found["gzip_ratio"] == pytest.approx(len(text) / len(gzip.compress(text)))


def test_the_commonest_replies_are_ten_at_most():
    replies = [made(f"reply {place}") for place in range(12)] + [made("reply 0")] * 3
    assert values(x.of_replies(replies))["common_replies"] == pytest.approx(100 * (4 + 9) / 15)


def test_overlap_by_hand(replies):
    pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score")
    found = values(x.overlap(replies))
    assert found["bleu_1"] == pytest.approx(100 * 10 / 30)  # 26 words of references: no penalty for brevity
    assert found["bleu_2"] == pytest.approx(100 * math.sqrt(10 / 30 * 5 / 26))
    assert found["bleu_3"] == pytest.approx(100 * (10 / 30 * 5 / 26 * 3 / 22) ** (1 / 3))
    assert found["bleu_4"] == pytest.approx(100 * (10 / 30 * 5 / 26 * 3 / 22 * 2 / 18) ** (1 / 4))
    assert found["rouge_1"] == pytest.approx(100 * (0 + 6 / 17 + 8 / 11 + 1 / 3) / 4)
    assert found["rouge_2"] == pytest.approx(100 * (0 + 2 / 15 + 6 / 9 + 0) / 4)
    assert found["rouge_L"] == pytest.approx(100 * (0 + 4 / 17 + 8 / 11 + 1 / 3) / 4)


def test_everything_is_drawn_from_what_gives_the_whole_value(replies):
    measures = [*x.of_replies(replies), *x.overlap(replies)]
    assert all(measure.metric.value is not None or "not installed" in measure.metric.reason for measure in measures)
    for measure in measures:
        if measure.spread is not None:
            assert whole(measure) == pytest.approx(measure.metric.value, rel=1e-9), measure.metric.name


@pytest.mark.parametrize("count", [1, 2, 30])
def test_bleu_and_chrf_of_sums_are_those_of_sacrebleu(count):
    metrics = pytest.importorskip("sacrebleu.metrics")
    rows = many(np.random.default_rng(count), count)
    replies = [made(row["reply"], row["reference"]) for row in rows]
    texts, references = [row["reply"] for row in rows], [[row["reference"] for row in rows]]
    found = {measure.metric.name: measure for measure in x.overlap(replies)}
    for n in (1, 2, 3, 4):
        expected = metrics.BLEU(lowercase=True, tokenize="none", force=True, max_ngram_order=n).corpus_score(texts, references)
        assert found[f"bleu_{n}"].metric.value == pytest.approx(expected.score, rel=1e-12)
        spread = found[f"bleu_{n}"].spread
        assert spread.value(spread.rows.sum(0)) == pytest.approx(expected.score, rel=1e-9)
        some = np.stack([spread.rows[:1].sum(0), spread.rows[-1:].sum(0)])  # one reply alone: orders without a match
        alone = [metrics.BLEU(lowercase=True, tokenize="none", force=True, max_ngram_order=n).corpus_score(
            [texts[place]], [[references[0][place]]]).score for place in (0, -1)]
        assert spread.value(some) == pytest.approx(alone, rel=1e-9)
    assert found["chrf"].metric.value == pytest.approx(metrics.CHRF(lowercase=True).corpus_score(texts, references).score)
    spread = found["chrf"].spread
    assert spread.value(spread.rows) == pytest.approx(
        [metrics.CHRF(lowercase=True).sentence_score(one, [other]).score for one, other in zip(texts, *references, strict=True)])
    assert "nrefs:1,case:lc,eff:no,tok:none,smooth:exp,version:" in found["bleu_4"].metric.signature


def test_self_bleu_is_the_mean_against_all_others():
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    pytest.importorskip("sacrebleu")
    same = [made("i am so sorry .")] * 3
    assert values(x.of_replies(same))["self_bleu"] == pytest.approx(100)
    rows = many(np.random.default_rng(0), 40, common=0.3)
    texts = [row["reply"].split() for row in rows if len(row["reply"].split()) >= 4]
    expected = []
    for place, text in enumerate(texts):
        others = texts[:place] + texts[place + 1 :]
        expected.append(100 * nltk.sentence_bleu(others, text, smoothing_function=nltk.SmoothingFunction().method3))
    (found,) = [of for of in x.of_replies([made(" ".join(text)) for text in texts]) if of.metric.name == "self_bleu"]
    scores = found.spread.rows[:, 0]
    whole_matches = [place for place, score in enumerate(expected) if score > 99.99]
    assert whole_matches and scores[whole_matches] == pytest.approx(100)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert f"sample={len(texts)}|seed=0" in found.metric.signature
    (alone,) = [of for of in x.of_replies(same[:1]) if of.metric.name == "self_bleu"]
    assert alone.metric.reason == "a single reply"


def test_what_a_model_predicts(replies):
    assert x.predicted(replies) == []  # text blocks know no likelihoods and no guesses
    told = [made("a", emotion=EMOTIONS[0], predicted=EMOTIONS[0], nll=2 * math.log(4), tokens=2),
            made("a", emotion=EMOTIONS[1], predicted=EMOTIONS[0], nll=math.log(16), tokens=1), made("a", emotion=EMOTIONS[1])]
    ppl, accuracy = x.predicted(told, 10)
    assert (ppl.metric.name, ppl.metric.value, ppl.metric.count) == ("ppl_geometric", pytest.approx(8), 2)
    assert "vocabulary=10" in ppl.metric.signature
    assert (accuracy.metric.value, accuracy.metric.count) == (0.5, 2)
    for measure in (ppl, accuracy):
        assert measure.spread.value(measure.spread.rows.sum(0)) == pytest.approx(measure.metric.value)


def test_what_is_not_installed_or_not_there_is_said(replies, monkeypatch):
    for module in ("sacrebleu.metrics", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    found = {measure.metric.name: measure for measure in [*x.overlap(replies), *x.of_replies(replies)]}
    assert found["bleu_4"].metric.reason == "BLEU and chrF needs sacrebleu, which is not installed: pip install sacrebleu"
    assert found["rouge_L"].metric.reason == "ROUGE needs rouge-score, which is not installed: pip install rouge-score"
    assert found["self_bleu"].metric.value is None and found["dist_1"].metric.value is not None
    assert {of.metric.reason for of in x.overlap([made("a b")])} == {"no reply has a reference"}


def test_replies_without_words_are_no_error():
    found = x.of_replies([made(""), made("", "why ?"), made("a")])
    assert values(found)["distinct_replies"] == 2 and values(found)["repeated_4"] is None
    assert "no 4-gram to measure" in {measure.metric.reason for measure in found}
    assert values(x.of_replies([made(""), made("")]))["dist_1"] is None
    for measure in x.overlap([made("", "why ?"), made("a", "why ?")]):
        assert measure.metric.value == 0 or measure.metric.value is None
