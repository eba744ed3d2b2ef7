"""The floors: a bigram model worked out by hand, EM that only climbs, a classifier of what is separable, the command."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from sklearn.feature_extraction.text import TfidfVectorizer

from case_fast import cli
from case_fast.data.empathetic_dialogues import EMOTIONS
from case_fast.data.ragged import Ragged
from case_fast.data.vocabulary import BOS, EOS, SPEAKER, UNK
from case_fast.errors import ConfigError
from case_fast.evaluation.floors import Bigrams, LinearClassifier, _speakers_words, floors, table

A, B, C, VOCABULARY = 8, 9, 10, 11


def rows(*texts: list[int]) -> Ragged:
    return Ragged.of([np.array(text, dtype=np.int32) for text in texts])


def every_word(before: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(VOCABULARY, before), np.arange(VOCABULARY)


def test_a_bigram_model_worked_out_by_hand():
    model = Bigrams(rows([A, B], [A, A]), VOCABULARY)  # targets a b EOS, a a EOS after BOS a b, BOS a a
    model.weights = np.array([0.5, 0.3, 0.2])
    asked = rows([A, B, UNK], [])
    nll = model.nll(asked)
    uniform = 0.2 / 11
    expected = [0.5 * 2 / 2 + 0.3 * 3 / 6 + uniform,  # a after BOS
                0.5 * 1 / 3 + 0.3 * 1 / 6 + uniform,  # b after a, which EOS and a follow as well
                uniform,  # the unknown word was never seen
                0.8 * 2 / 6 + uniform,  # EOS after it: nothing follows it in training, so the unigram stands in
                0.3 * 2 / 6 + uniform]  # EOS of an empty reply: nothing of the kind in training
    assert [len(row) for row in nll] == [4, 1]
    assert np.exp(-np.concatenate(nll)) == pytest.approx(expected)


@pytest.mark.parametrize("before", [BOS, A, B, C, UNK, EOS])
def test_probabilities_after_any_word_sum_to_one(before):
    model = Bigrams(rows([A, B, C], [A, A], [], [C, B]), VOCABULARY)
    model.interpolate(rows([A, B], [C]))
    assert model.components(*every_word(before)).sum(0) == pytest.approx([1, 1, 1])
    assert (model.components(*every_word(before)) @ model.weights).sum() == pytest.approx(1)
    assert model.weights.sum() == pytest.approx(1) and (model.weights >= 0).all()


def test_em_only_climbs_and_ends_at_the_best_weights():
    random = np.random.default_rng(0)
    words = [random.choice(3, size=random.integers(0, 9), p=[0.6, 0.3, 0.1]) + A for _ in range(60)]
    model = Bigrams(rows(*words[:30]), VOCABULARY)
    found = model.interpolate(rows(*words[30:], [UNK]))
    assert len(found) > 3 and all(np.diff(found) >= -1e-12)
    parts = np.concatenate(model.nll(rows(*words[30:], [UNK])))
    assert -parts.mean() == pytest.approx(found[-1], abs=1e-7)
    best = model.weights
    for change in np.array([[1, -1, 0], [0, 1, -1], [-1, 0, 1]]) * 0.01:
        for weights in (best + change, best - change):
            if (weights > 0).all():
                model.weights = weights
                assert np.concatenate(model.nll(rows(*words[30:], [UNK]))).mean() > parts.mean()


def test_a_model_that_knows_its_replies_is_as_sure_as_it_can_be():
    model = Bigrams(rows([A, B]), VOCABULARY)
    model.interpolate(rows([A, B]))
    assert math.exp(np.concatenate(model.nll(rows([A, B]))).mean()) == pytest.approx(1, abs=1e-3)


def test_what_is_separable_is_separated_and_a_pair_of_words_counts():
    random = np.random.default_rng(0)

    def texts(n: int) -> tuple[Ragged, np.ndarray]:
        label = random.integers(3, size=n)
        said = [[[A, B, A, B], [B, B, A, A], [C, A]][which] for which in label]
        return rows(*[[*text, *random.integers(11, 20, size=3)] for text in said]), label.astype(np.int32) * 7

    train, labels = texts(60)
    labels[:2] = -1  # unknown: left out
    model = LinearClassifier(train, labels, 20)
    asked, right = texts(40)
    scores = model.log_probability(asked)
    assert scores.shape == (40, len(EMOTIONS)) and (scores.argmax(1) == right).all()
    assert np.exp(scores).sum(1) == pytest.approx(1) and set(np.flatnonzero(np.isfinite(scores[0]))) == {0, 7, 14}
    assert (model.log_probability(rows([], [0, 1])) == model.log_probability(rows([3], []))[1]).all()  # nothing known


def test_features_are_those_of_scikit_learn_on_words():
    said = ["a b a b c", "b a", "c c a b", "", "a"]
    ids = rows(*[[{"a": A, "b": B, "c": C}[word] for word in text.split()] for text in said])
    model = LinearClassifier(ids, np.array([0, 1, 2, 0, 1]), VOCABULARY)
    theirs = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    expected = theirs.fit_transform(said)
    assert model.features == expected.shape[1] == 5  # a, b, c, a b, b a
    ours = model._features(ids).toarray()
    order = [theirs.vocabulary_[name] for name in ("a", "b", "c", "a b", "b a")]
    assert ours == pytest.approx(expected.toarray()[:, order])


def test_the_speakers_words_alone_are_read(sample_store):
    found = _speakers_words(sample_store, "valid")
    for index in range(sample_store.size("valid")):
        example = sample_store.example("valid", index)
        assert found.row(index).tolist() == example.context[example.context_role == SPEAKER].tolist()


def test_floors_are_taken_over_the_targets_of_evaluate(sample_store):
    found = floors(sample_store, "test")
    targets = sum(len(sample_store.example("test", index).response) + 1 for index in range(sample_store.size("test")))
    assert [metric.count for metric in found.perplexities] == [targets, found.examples, found.examples]
    assert [metric.name for metric in found.perplexities] == ["ppl", "ppl_geometric", "ppl_response"]
    assert f"vocabulary={len(sample_store.featurizer.vocabulary)}|" in found.perplexities[0].signature
    assert 1 < found.perplexities[0].value < len(sample_store.featurizer.vocabulary)
    assert found.accuracies[0].value > 1 / 32 and sum(found.weights) == pytest.approx(1)
    again = floors(sample_store, "test")
    assert (again.perplexities, again.accuracies) == (found.perplexities, found.accuracies)
    stream = io.StringIO()
    Console(file=stream, width=160).print(table(found))
    assert all(metric.text in stream.getvalue() for metric in found.perplexities + found.accuracies)


def test_the_command_prints_and_writes(sample_store, tmp_path, capsys):
    assert cli.main(["floors", str(sample_store.path), "--split", "valid", "--json", str(tmp_path / "floors.json")]) == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "floors.json").read_text())
    assert written["split"] == "valid" and {metric["name"] for metric in written["accuracies"]} == {"acc_1", "acc_5"}
    assert "Perplexity" in shown and "Emotion accuracy" in shown
    assert cli.main(["floors", str(sample_store.path), "--split", "dev"]) == 1
    assert "has no dev examples; it has train, valid, test" in " ".join(capsys.readouterr().err.split())


def test_a_split_that_is_not_there_is_named(sample_store):
    with pytest.raises(ConfigError, match="has no dev examples"):
        floors(sample_store, "dev")
