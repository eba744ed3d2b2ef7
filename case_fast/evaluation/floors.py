"""What the simplest models reach on a split of a store, measured as `evaluate` measures: a floor for every other model.

The replies are predicted by an interpolated bigram model, which sees one word back and nothing of the dialogue; the emotion by
logistic regression on TF-IDF of the speaker's words and pairs of words. Both learn from the training split alone and draw no
random numbers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from case_fast.data.empathetic_dialogues import EMOTIONS
from case_fast.data.ragged import Beside, Ragged
from case_fast.data.store import Store
from case_fast.data.vocabulary import BOS, EOS, SPEAKER
from case_fast.errors import ConfigError
from case_fast.evaluation import metrics as m
from case_fast.evaluation.metrics import Metric
from case_fast.optional import needed

if TYPE_CHECKING:
    from rich.table import Table

TOP = 5
INVERSE_REGULARISATION = 3.0  # best of 1, 3 and 10 on the validation split of EmpatheticDialogues


@dataclass(frozen=True)
class Floors:
    """What `floors` found.

    Attributes:
        perplexities: the three of `evaluate`, over the same targets, by the bigram model.
        accuracies: emotion accuracy, top 1 and top 5, by the linear classifier.
        weights: of the bigram, the unigram and the uniform distribution.
        features: words and pairs of words that the classifier knows; ``iterations``: of its fit.
    """

    store: str
    split: str
    examples: int
    perplexities: list[Metric]
    accuracies: list[Metric]
    weights: tuple[float, float, float]
    features: int
    iterations: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def floors(store: Store, split: str = "test") -> Floors:
    """Fit both models on the training split, and measure them on ``split``.

    Raises:
        ConfigError: the store lacks one of the splits train, valid and ``split``, or it has no examples.
        MissingPackage: scikit-learn is not installed.
    """
    started = time.perf_counter()
    for name in ("train", "valid", split):
        if name not in store.splits or not store.size(name):
            raise ConfigError(f"the store {store.path} has no {name} examples; it has {', '.join(store.splits)}")
    words = len(store.featurizer.vocabulary)
    bigrams = Bigrams(store.field("train", "response"), words)
    bigrams.interpolate(store.field("valid", "response"))
    train, asked = (_speakers_words(store, name) for name in ("train", split))
    linear = LinearClassifier(train, store.emotions("train"), words)
    scores, labels = linear.log_probability(asked), store.emotions(split)
    return Floors(
        str(store.path), split, store.size(split), m.perplexities(bigrams.nll(store.field(split, "response")), words),
        [m.emotion_accuracy(scores, labels, k) for k in (1, TOP)], tuple(bigrams.weights.tolist()), linear.features,
        linear.iterations, round(time.perf_counter() - started, 2),
    )


# ---- replies


class Bigrams:
    """P(w | v) = a (w after v) / (v followed by anything) + b (w) / (all targets) + c / V, with a + b + c = 1.

    v is the word before, BOS before the first; counts are of the training replies, EOS a target like any other. Where v was never
    followed by anything, the second fraction stands in for the first.

    Attributes:
        weights: (3,) a, b, c; a third each until `interpolate` has chosen them.
    """

    def __init__(self, replies: Ragged, vocabulary: int):
        self.vocabulary, self.weights = vocabulary, np.full(3, 1 / 3)
        before, word = _targets(replies)
        self._pairs, self._counts = np.unique(before * vocabulary + word, return_counts=True)
        self._followed = np.bincount(before, minlength=vocabulary)
        self._unigram = np.bincount(word, minlength=vocabulary) / len(word)

    def components(self, before: np.ndarray, word: np.ndarray) -> np.ndarray:
        """(n, 3) what each of the three distributions says of ``word`` (n,) after ``before`` (n,)."""
        pairs = before * self.vocabulary + word
        place = np.searchsorted(self._pairs, pairs).clip(max=len(self._pairs) - 1)
        counts = np.where(self._pairs[place] == pairs, self._counts[place], 0)
        followed, unigram = self._followed[before], self._unigram[word]
        bigram = np.where(followed > 0, counts / followed.clip(min=1), unigram)
        return np.stack([bigram, unigram, np.full(len(word), 1 / self.vocabulary)], axis=1)

    def interpolate(self, replies: Ragged, tolerance: float = 1e-8) -> list[float]:
        """Choose the weights under which ``replies`` are most probable, by EM; the mean log-likelihood (nats) before each of its
        steps, the last of which gained less than ``tolerance``."""
        parts, found = self.components(*_targets(replies)), [-math.inf]
        while True:
            joint = parts * self.weights
            whole = joint.sum(1, keepdims=True)
            found.append(float(np.log(whole).mean()))
            if found[-1] - found[-2] < tolerance:
                return found[1:]
            self.weights = (joint / whole).mean(0)

    def nll(self, replies: Ragged) -> list[np.ndarray]:
        """-log P (nats) of the words and the EOS of each reply."""
        values = -np.log(self.components(*_targets(replies)) @ self.weights)
        return np.split(values, (replies.offsets + np.arange(len(replies) + 1))[1:-1])


def _targets(replies: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """The words and the EOS of all replies, end to end, and the word before each."""
    return Beside(1, replies.sizes)(BOS, replies.values), Beside(replies.sizes, 1)(replies.values, EOS)


# ---- emotions


class LinearClassifier:
    """Multinomial logistic regression with an L2 penalty on TF-IDF (1 + log tf, smoothed idf, unit length) of words and pairs of
    neighbouring words that at least two texts hold.

    Args:
        texts: word ids.
        labels: (n,); texts with a label below 0, which is unknown, are left out.
        inverse: of the penalty's strength, scikit-learn's C.
    """

    def __init__(self, texts: Ragged, labels: np.ndarray, vocabulary: int, inverse: float = INVERSE_REGULARISATION):
        self._vocabulary = vocabulary
        labelled = np.flatnonzero(labels >= 0)
        row, gram = _grams(texts.take(labelled), vocabulary)
        self._known = np.unique(gram)
        counts = self._counts(row, gram, len(labelled))
        often = counts.getnnz(axis=0) >= 2
        self._known = self._known[often]
        self._tfidf = _sklearn("feature_extraction.text").TfidfTransformer(sublinear_tf=True)
        features = self._tfidf.fit_transform(counts[:, often])
        self._fitted = _sklearn("linear_model").LogisticRegression(C=inverse, max_iter=500, tol=1e-3)
        self._fitted.fit(features, labels[labelled])

    @property
    def features(self) -> int:
        return len(self._known)

    @property
    def iterations(self) -> int:
        return int(self._fitted.n_iter_[0])

    def log_probability(self, texts: Ragged) -> np.ndarray:
        """(n, emotions), -inf for an emotion that no training text has."""
        found = np.full((len(texts), len(EMOTIONS)), -math.inf)
        found[:, self._fitted.classes_] = self._fitted.predict_log_proba(self._features(texts))
        return found

    def _features(self, texts: Ragged) -> Any:
        """(texts, known grams), sparse."""
        return self._tfidf.transform(self._counts(*_grams(texts, self._vocabulary), len(texts)))

    def _counts(self, row: np.ndarray, gram: np.ndarray, texts: int) -> Any:
        """(texts, known grams), sparse."""
        place = np.searchsorted(self._known, gram).clip(max=len(self._known) - 1)
        hit = self._known[place] == gram
        values = np.ones(hit.sum())
        return needed("scipy.sparse", _WHAT).csr_matrix((values, (row[hit], place[hit])), (texts, len(self._known)))


_WHAT = "a linear classifier of emotions"


def _sklearn(part: str) -> Any:
    return needed(f"sklearn.{part}", _WHAT)


def _speakers_words(store: Store, split: str) -> Ragged:
    """Of each context."""
    context, role = store.field(split, "context"), store.field(split, "context_role")
    said = role.values == SPEAKER
    before = np.concatenate([[0], np.cumsum(said)])
    return Ragged(context.values[said], before[context.offsets])


def _grams(texts: Ragged, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Every word and every pair of neighbouring words of a text: the text's row, and a number for each."""
    row = np.arange(len(texts)).repeat(texts.sizes)
    word = texts.values.astype(np.int64)
    pair = (word[:-1] + 1) * vocabulary + word[1:]
    within = row[:-1] == row[1:]
    return np.concatenate([row, row[:-1][within]]), np.concatenate([word, pair[within]])


# ---- showing


def table(found: Floors) -> Table:
    """For the terminal."""
    made = needed("rich.table", "a table in the terminal").Table(
        title=f"Floors on {found.split}, all {found.examples:,} examples", title_justify="left")
    bigram, unigram, uniform = found.weights
    made.add_column("metric")
    made.add_column("value", justify="right")
    made.add_column("n", justify="right")
    made.add_column("model")
    models = [f"bigrams {bigram:.3f}, unigrams {unigram:.3f}, uniform {uniform:.2g}"] * len(found.perplexities)
    models += [f"logistic regression on TF-IDF of {found.features:,} words and pairs"] * len(found.accuracies)
    for metric, model in zip(found.perplexities + found.accuracies, models, strict=True):
        made.add_row(metric.title, metric.text, f"{metric.count:,}", model)
    return made
