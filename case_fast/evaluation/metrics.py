"""Metrics as pure functions of plain data; each result carries the signature that says how it was computed.

Nothing here raises on empty or damaged values: such a metric has no value, and its ``reason`` says why.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from case_fast import __version__

# What a reply does, as EmpatheticIntents has it (Welivita and Pu, 2020).
INTENTS = ("questioning", "acknowledging", "consoling", "agreeing", "encouraging", "sympathizing", "suggesting", "wishing",
           "neutral")

TITLES = {
    "ppl": "Perplexity",
    "ppl_geometric": "Perplexity, geometric mean of responses",
    "ppl_response": "Perplexity, mean of responses",
    "dist_1": "Dist-1",
    "dist_2": "Dist-2",
    "dist_3": "Dist-3",
    "acc_1": "Emotion accuracy",
    "acc_5": "Emotion accuracy, top 5",
    "distinct_replies": "Distinct replies",
    "reply_words": "Words a reply",
    "unk_rate": "Unknown words in the references",
    "gzip_ratio": "Compression ratio, gzip",
    "self_repetition": "Self-repetition of 4-grams",
    "self_bleu": "Self-BLEU",
    **{f"repeated_{n}": f"Repeated {n}-grams within a reply, %" for n in (1, 2, 3, 4)},
    "common_replies": "Replies among the 10 commonest, %",
    "epitome_er": "EPITOME: emotional reactions, 0-2",
    "epitome_ip": "EPITOME: interpretations, 0-2",
    "epitome_ex": "EPITOME: explorations, 0-2",
    "intent_agreement": "Intent of the reference, %",
    **{f"intent_{name}": f"Intent {name}, %" for name in INTENTS},
    "bert_score": "BERTScore, F1",
    **{f"rouge_{kind}": f"ROUGE-{kind}, F1" for kind in ("1", "2", "L")},
    **{f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)},
    "chrf": "chrF",
}


@dataclass(frozen=True)
class Metric:
    """One number and where it comes from.

    Attributes:
        name: key in files; `title` is for people.
        value: None where it is undefined; ``reason`` then says why.
        signature: how it was computed; only values of equal signatures are comparable.
        better: which way is better, None where neither is.
        count: how many tokens, replies, n-grams or examples it was taken over.
    """

    name: str
    value: float | None
    signature: str
    better: Literal["higher", "lower"] | None = None
    count: int = 0
    reason: str = ""

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    @property
    def text(self) -> str:
        return format_value(self.value)


def format_value(value: float | None) -> str:
    """A value as tables show it: whole numbers as they are, others with two decimals, below 1 with three."""
    if value is None:
        return "n/a"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3f}"


def signature_of(name: str, **how: object) -> str:
    """name|key=value|...|case_fast=version; what is None or "" is left out."""
    parts = [f"{key}={value}" for key, value in how.items() if value not in (None, "")]
    return "|".join([name, *parts, f"case_fast={__version__}"])


# ---- how well the references are predicted


def perplexities(nll: Sequence[Sequence[float]], vocabulary: int | None = None) -> list[Metric]:
    """All three, as `evaluate` prints them; arguments as for `perplexity`."""
    return [perplexity(nll, vocabulary), geometric_perplexity(nll, vocabulary), response_perplexity(nll, vocabulary)]


def perplexity(nll: Iterable[Sequence[float]], vocabulary: int | None = None) -> Metric:
    """exp(sum of -log P / number of target tokens), all replies together.

    Args:
        nll: for each reference, -log P (nats) of its words and its EOS.
        vocabulary: size of the vocabulary, for the signature: values over different vocabularies do not compare.
    """
    signature = signature_of("ppl", tokens="words+eos", unk="counted", weight="token", vocabulary=vocabulary)
    values = np.concatenate([np.zeros(0), *(np.asarray(row, dtype=np.float64) for row in nll)])
    reason = _unusable(values, "target token")
    value, reason = (None, reason) if reason else _exp_mean([math.fsum(values) / len(values)])
    return Metric("ppl", value, signature, "lower", len(values), reason)


def geometric_perplexity(nll: Iterable[Sequence[float]], vocabulary: int | None = None) -> Metric:
    """exp(mean over references of the mean -log P of its tokens), what papers of this field print: their code averages the loss
    over batches of one dialogue. Arguments as for `perplexity`."""
    means, reason = _means(nll)
    value, reason = (None, reason) if reason else _exp_mean([math.fsum(means) / len(means)])
    return Metric("ppl_geometric", value, _of_responses("ppl_geometric", vocabulary), "lower", len(means), reason)


def response_perplexity(nll: Iterable[Sequence[float]], vocabulary: int | None = None) -> Metric:
    """Mean over references of exp(mean -log P of its tokens); arguments as for `perplexity`."""
    means, reason = _means(nll)
    value, reason = (None, reason) if reason else _exp_mean(means)
    return Metric("ppl_response", value, _of_responses("ppl_response", vocabulary), "lower", len(means), reason)


def _of_responses(name: str, vocabulary: int | None) -> str:
    return signature_of(name, tokens="words+eos", unk="counted", weight="response", vocabulary=vocabulary)


def _means(nll: Iterable[Sequence[float]]) -> tuple[list[float], str]:
    """The mean of each reference that has tokens, and why they cannot be used ("": they can)."""
    rows = [np.asarray(row, dtype=np.float64) for row in nll]
    means = [math.fsum(row) / len(row) for row in rows if len(row)]
    return means, _unusable(np.array(means), "reference")


def _unusable(values: np.ndarray, what: str) -> str:
    if not len(values):
        return f"no {what}"
    bad = int((~np.isfinite(values)).sum())
    return f"{bad:,} of {len(values):,} values are not finite" if bad else ""


def _exp_mean(exponents: Sequence[float]) -> tuple[float | None, str]:
    try:
        return math.fsum(map(math.exp, exponents)) / len(exponents), ""
    except OverflowError:
        return None, f"a mean negative log-likelihood of {max(exponents):.0f} nats is too large for exp"


def unknown_rate(references: Iterable[Sequence[int]], unk: int) -> Metric:
    """Share (0..1) of the references' words that are not in the vocabulary; EOS is not counted."""
    total = unknown = 0
    for words in references:
        total += len(words)
        unknown += sum(word == unk for word in words)
    value, reason = (unknown / total, "") if total else (None, "no word in the references")
    return Metric("unk_rate", value, signature_of("unk_rate", tokens="words", of="references"), None, total, reason)


# ---- what the replies are like


def n_grams(words: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Those of one reply, in order."""
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def distinct_n(replies: Iterable[Sequence[Hashable]], n: int, decoding: str = "") -> Metric:
    """100 x distinct / total n-grams over all replies together (Li et al., 2016); none crosses from reply to reply.

    Args:
        replies: the words of each reply, without EOS.
        decoding: how the replies were chosen, for the signature.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for words in replies:
        grams = n_grams(words, n)
        seen.update(grams)
        total += len(grams)
    name = f"dist_{n}"
    signature = signature_of(name, scale=100, scope="all_replies", tokens="words", eos="excluded", decoding=decoding)
    value, reason = (100 * len(seen) / total, "") if total else (None, f"no reply has {n} word{'s' if n > 1 else ''}")
    return Metric(name, value, signature, "higher", total, reason)


def distinct_replies(replies: Sequence[Sequence[Hashable]], decoding: str = "") -> Metric:
    """How many replies differ from all others before them, word by word."""
    signature = signature_of("distinct_replies", tokens="words", eos="excluded", decoding=decoding)
    value, reason = (len(set(map(tuple, replies))), "") if replies else (None, "no reply")
    return Metric("distinct_replies", value, signature, "higher", len(replies), reason)


def reply_words(replies: Sequence[Sequence[Hashable]], decoding: str = "") -> Metric:
    """Mean number of words and punctuation marks of a reply; an empty reply counts as 0."""
    signature = signature_of("reply_words", tokens="words", eos="excluded", decoding=decoding)
    value, reason = (sum(map(len, replies)) / len(replies), "") if replies else (None, "no reply")
    return Metric("reply_words", value, signature, None, len(replies), reason)


# ---- emotions


def rank_emotions(log_probability: np.ndarray) -> np.ndarray:
    """(n, classes) scores -> (n, classes) labels, most probable first; of equal scores the lower label comes first."""
    return np.argsort(-np.asarray(log_probability), axis=1, kind="stable")


def emotion_accuracy(log_probability: np.ndarray | None, labels: Sequence[int], k: int = 1) -> Metric:
    """Share (0..1) of examples whose label is among the k most probable; `rank_emotions` settles ties.

    Args:
        log_probability: (n, classes); None: the model predicts no emotion.
        labels: (n,); examples with a label below 0, which is unknown, are left out.
    """
    if log_probability is None:
        return Metric(f"acc_{k}", None, signature_of(f"acc_{k}"), "higher", 0, "the model predicts no emotion")
    scores, labels = np.asarray(log_probability, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    known = labels >= 0
    scores, labels = scores[known], labels[known]
    classes = scores.shape[1] if scores.ndim == 2 else 0
    signature = signature_of(f"acc_{k}", classes=classes, unlabelled="left_out", ties="lower_label")
    reason = "" if len(labels) else "no example has an emotion label"
    bad = int(np.isnan(scores).any(axis=1).sum()) if len(labels) else 0
    if bad:
        reason = f"the emotion scores of {bad:,} of {len(labels):,} examples are not numbers"
    value = None if reason else float((rank_emotions(scores)[:, :k] == labels[:, None]).any(axis=1).mean())
    return Metric(f"acc_{k}", value, signature, "higher", len(labels), reason)


def emotion_confusion(labels: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """(classes, classes) counts, rows the labels, columns the predictions; unknown labels (below 0) are left out."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    for label, guess in zip(labels, predicted, strict=True):
        if label >= 0:
            counts[label, guess] += 1
    return counts
