"""What `score` measures of a system's replies: each metric with what its interval and its differences are drawn from.

A metric is a function of sums over replies (means, perplexity, BLEU: `Sums`), or of which replies there are together (Dist-n, the
compression ratio: `Parts`). `case_fast.evaluation.statistics` draws from both.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np

from case_fast.data.empathetic_dialogues import EMOTIONS
from case_fast.evaluation import metrics as m
from case_fast.evaluation.metrics import Metric, signature_of
from case_fast.evaluation.replies import Reply
from case_fast.optional import MissingPackage, needed

GROUPS = {"paper": "The paper's", "diversity": "Diversity and repetition", "empathy": "Empathy, by rough classifiers",
          "overlap": "Overlap with one reference: at chance level for empathy"}
SAMPLE = 200  # replies that Self-BLEU compares
COMMON = 10  # of the commonest replies


@dataclass(frozen=True)
class Sums:
    """A metric that sums over the replies decide.

    Attributes:
        rows: (n, K) what each reply adds.
        value: (..., K) sums -> (...) values; NaN where there is none.
    """

    rows: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Parts:
    """A metric that only the replies together decide.

    Attributes:
        value: of those replies that a mask (n,) chooses.
        things: of each reply that of which the different ones are counted (for Dist-n its n-grams); None of other metrics.
    """

    value: Callable[[np.ndarray], float]
    things: Sequence[Sequence[Hashable]] | None = None


@dataclass(frozen=True)
class Measure:
    """A metric of some replies; ``spread`` is None where it has no value, and its reason says why."""

    metric: Metric
    group: str
    spread: Sums | Parts | None


def mean(sums: np.ndarray) -> np.ndarray:
    """(..., 2) sum and count -> their quotient."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def percent(sums: np.ndarray) -> np.ndarray:
    return 100 * mean(sums)


def of_rows(name: str, group: str, signature: str, better: Literal["higher", "lower"] | None, rows: np.ndarray,
            value: Callable[[np.ndarray], np.ndarray], of: str = "reply") -> Measure:
    """The measure that rows of sums give; their last column counts what it is taken over."""
    count = int(rows[:, -1].sum())
    found = float(value(rows.sum(0))) if count else np.nan
    if not np.isfinite(found):
        return Measure(Metric(name, None, signature, better, count, f"no {of} to measure"), group, None)
    return Measure(Metric(name, found, signature, better, count), group, Sums(rows, value))


def absent(name: str, group: str, reason: str, better: Literal["higher", "lower"] | None = None) -> Measure:
    return Measure(Metric(name, None, signature_of(name), better, 0, reason), group, None)


# ---- what a model of ours predicts, from predictions.jsonl


def predicted(replies: Sequence[Reply], vocabulary: int | None = None) -> list[Measure]:
    """Perplexity (of responses, geometric, as papers print it) and emotion accuracy; [] where no reply tells them."""
    found = []
    means = np.array([reply.nll / reply.tokens if reply.nll is not None else np.nan for reply in replies])
    if (known := ~np.isnan(means)).any():
        rows = np.stack([np.where(known, means, 0), known], axis=1)
        metric = m.geometric_perplexity(means[known, None], vocabulary)
        spread = Sums(rows, lambda sums: np.exp(mean(sums))) if metric.value is not None else None
        found.append(Measure(metric, "paper", spread))
    place = {emotion: label for label, emotion in enumerate(EMOTIONS)}
    label = np.array([place.get(reply.emotion, -1) for reply in replies])
    guess = np.array([place.get(reply.predicted, -1) for reply in replies])
    if (guess >= 0).any():
        label[guess < 0] = -1
        metric = m.emotion_accuracy(np.eye(len(EMOTIONS))[guess], label, 1)
        rows = np.stack([(label == guess) & (label >= 0), label >= 0], axis=1).astype(float)
        found.append(Measure(metric, "paper", Sums(rows, mean) if metric.value is not None else None))
    return found


# ---- what the replies are like


def of_replies(replies: Sequence[Reply]) -> list[Measure]:
    """Diversity over the replies, and repetition within them."""
    words = [reply.words for reply in replies]
    found = [_different(m.distinct_n(words, n), "paper" if n < 3 else "diversity", [m.n_grams(row, n) for row in words])
             for n in (1, 2, 3)]
    found.append(_different(m.distinct_replies(words), "diversity", [[row] for row in words]))
    lengths = np.array([[len(row), 1] for row in words], dtype=float)
    found.append(Measure(m.reply_words(words), "diversity", Sums(lengths, mean)))
    found += [_gzip_ratio(words), _self_repetition(words), _self_bleu(words)]
    for n in (1, 2, 3, 4):
        rows = np.array([[len(grams) - len(set(grams)), len(grams)] for grams in (m.n_grams(row, n) for row in words)],
                        dtype=float)
        signature = signature_of(f"repeated_{n}", scale=100, scope="each_reply", tokens="words")
        found.append(of_rows(f"repeated_{n}", "diversity", signature, "lower", rows, percent, f"{n}-gram"))
    return [*found, _common(words)]


def _numbered(things: Sequence[Sequence[Hashable]]) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each thing its number, equal for equal things, and its reply; and how many different ones there are."""
    numbers: dict[Hashable, int] = {}
    found = [(numbers.setdefault(thing, len(numbers)), place) for place, row in enumerate(things) for thing in row]
    number, owner = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return number, owner, len(numbers)


def _different(metric: Metric, group: str, things: Sequence[Sequence[Hashable]]) -> Measure:
    """Of a metric that counts different things, per cent of all or their number."""
    if metric.value is None:
        return Measure(metric, group, None)
    number, owner, count = _numbered(things)
    share = metric.name.startswith("dist_")

    def value(mask: np.ndarray) -> float:
        chosen, seen = mask[owner], np.zeros(count, dtype=bool)
        seen[number[chosen]] = True
        return float(100 * seen.sum() / max(1, chosen.sum()) if share else seen.sum())

    return Measure(metric, group, Parts(value, things))


def _together(name: str, signature: str, better: Literal["higher", "lower"], value: Callable[[np.ndarray], float], replies: int
              ) -> Measure:
    found = value(np.ones(replies, dtype=bool))
    return Measure(Metric(name, found, signature, better, replies), "diversity", Parts(value))


def _gzip_ratio(words: Sequence[Sequence[str]]) -> Measure:
    """Bytes of all replies over bytes of them compressed (Shaib et al., 2024): the more alike, the higher."""
    texts = np.array([" ".join(row) for row in words], dtype=object)

    def value(mask: np.ndarray) -> float:
        whole = "\n".join(texts[mask]).encode()
        return len(whole) / len(gzip.compress(whole, 9, mtime=0))

    signature = signature_of("gzip_ratio", level=9, tokens="words", order="by_context")
    return _together("gzip_ratio", signature, "lower", value, len(words))


def _self_repetition(words: Sequence[Sequence[str]]) -> Measure:
    """Mean over replies of ln(1 + the sum over its 4-grams of how many other replies have it) (Salkar et al., 2022)."""
    number, owner, count = _numbered([m.n_grams(row, 4) for row in words])
    pairs = np.unique(owner * count + number) if len(number) else np.zeros(0, np.int64)
    whose, which = np.divmod(pairs, max(1, count))

    def value(mask: np.ndarray) -> float:
        have = np.bincount(which[mask[whose]], minlength=count)
        others = np.bincount(owner, weights=have[number] - 1, minlength=len(words))
        return float(np.log1p(others[mask]).mean())

    signature = signature_of("self_repetition", n=4, tokens="words", mean="ln(1+sum)")
    return _together("self_repetition", signature, "lower", value, len(words))


def _common(words: Sequence[Sequence[str]]) -> Measure:
    """Share of the replies that are one of the commonest."""
    number, _, count = _numbered([[tuple(row)] for row in words])

    def value(mask: np.ndarray) -> float:
        found = np.sort(np.bincount(number[mask], minlength=count))
        return float(100 * found[-COMMON:].sum() / mask.sum())

    signature = signature_of("common_replies", scale=100, of=COMMON, tokens="words")
    return _together("common_replies", signature, "lower", value, len(words))


def _self_bleu(words: Sequence[Sequence[str]]) -> Measure:
    """Mean BLEU-4 of a reply against all others of a sample (Zhu et al., 2018), by sacrebleu."""
    if len(words) < 2:
        return absent("self_bleu", "diversity", "a single reply", "lower")
    try:
        bleu = needed("sacrebleu.metrics", "Self-BLEU").BLEU(lowercase=True, tokenize="none", effective_order=True)
    except MissingPackage as error:
        return absent("self_bleu", "diversity", str(error), "lower")
    chosen = np.random.Generator(np.random.Philox(key=0)).permutation(len(words))[:SAMPLE]
    texts = [" ".join(words[place]) for place in chosen]
    rows = np.zeros((len(words), 2))
    for place, text in enumerate(texts):
        rows[chosen[place]] = bleu.sentence_score(text, texts[:place] + texts[place + 1 :]).score, 1
    bleu.num_refs = len(texts) - 1
    signature = signature_of("self_bleu", sample=len(texts), seed=0, sacrebleu=_sacrebleu(bleu))
    return of_rows("self_bleu", "diversity", signature, "lower", rows, mean)


# ---- overlap with the reference


def overlap(replies: Sequence[Reply]) -> list[Measure]:
    """ROUGE, BLEU and chrF of the replies that have a reference."""
    chosen = np.array([bool(reply.reference_words) for reply in replies])
    said = [(reply.words, reply.reference_words) for reply, known in zip(replies, chosen, strict=True) if known]
    if not said:
        return [absent(name, "overlap", "no reply has a reference", "higher") for name in ("rouge_L", "bleu_4", "chrf")]
    return [*_tried("rouge_L", _rouge, said, chosen), *_tried("bleu_4", _bleu, said, chosen)]


Said = Sequence[tuple[Sequence[str], Sequence[str]]]  # words of a reply, and of its reference


def _tried(name: str, measure: Callable[[Said, np.ndarray], list[Measure]], said: Said, chosen: np.ndarray) -> list[Measure]:
    try:
        return measure(said, chosen)
    except MissingPackage as error:
        return [absent(name, "overlap", str(error), "higher")]


def placed(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(n, K) with the rows at those replies that were ``chosen``, 0 elsewhere."""
    found = np.zeros((len(chosen), rows.shape[1]))
    found[chosen] = rows
    return found


def _rouge(said: Said, chosen: np.ndarray) -> list[Measure]:
    """Mean F1 over replies, by rouge-score with its own cutting into words."""
    scorer = needed("rouge_score.rouge_scorer", "ROUGE").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score(" ".join(reference), " ".join(words)) for words, reference in said]
    version = metadata.version("rouge-score")
    found = []
    for kind in ("1", "2", "L"):
        rows = np.array([[score[f"rouge{kind}"].fmeasure, 1] for score in scores])
        signature = signature_of(f"rouge_{kind}", of="F1", scale=100, stemmer="no", tokens="rouge-score", version=version)
        found.append(of_rows(f"rouge_{kind}", "overlap", signature, "higher", placed(rows, chosen), percent))
    return found


def _bleu(said: Said, chosen: np.ndarray) -> list[Measure]:
    """BLEU-1 to 4 and chrF of the corpus, by sacrebleu on our words."""
    metrics = needed("sacrebleu.metrics", "BLEU and chrF")
    texts, references = ([" ".join(side[place]) for side in said] for place in (0, 1))
    found = []
    for n in (1, 2, 3, 4):
        bleu = metrics.BLEU(lowercase=True, tokenize="none", force=True, max_ngram_order=n)
        rows = _statistics(bleu, texts, references)
        found.append(_corpus(f"bleu_{n}", bleu, rows, lambda sums, n=n: bleu_of(sums, n), chosen, order=f"1-{n}"))
    chrf = metrics.CHRF(lowercase=True)
    return [*found, _corpus("chrf", chrf, _statistics(chrf, texts, references), chrf_of, chosen)]


def _statistics(metric: Any, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(n, K) counts of each reply, of which sacrebleu makes its score: the step before that of its own resampling."""
    return np.array(metric._extract_corpus_statistics(texts, [references]), dtype=float)


def _corpus(name: str, metric: Any, rows: np.ndarray, value: Callable[[np.ndarray], np.ndarray], chosen: np.ndarray,
            **how: object) -> Measure:
    score = float(metric._compute_score_from_stats(rows.sum(0).tolist()).score)
    signature = signature_of(name, **how, sacrebleu=_sacrebleu(metric))
    return Measure(Metric(name, score, signature, "higher", len(rows)), "overlap", Sums(placed(rows, chosen), value))


def _sacrebleu(metric: Any) -> str:
    """Its own signature, with commas: bars part the fields of ours."""
    return str(metric.get_signature()).replace("|", ",")


def bleu_of(sums: np.ndarray, n: int) -> np.ndarray:
    """(..., 2 + 2n) words of replies and references, matched n-grams, all n-grams -> (...) BLEU, zeros smoothed exponentially."""
    said, reference, matched, total = sums[..., 0], sums[..., 1], sums[..., 2 : 2 + n], sums[..., 2 + n :]
    with np.errstate(divide="ignore", invalid="ignore"):
        smoothing = 0.5 ** np.cumsum(matched == 0, axis=-1)
        precision = np.where(matched > 0, matched, smoothing) / total
        brevity = np.exp(np.minimum(0, 1 - reference / said))
        found = 100 * brevity * np.exp(np.log(precision).mean(-1))
    return np.where((matched.sum(-1) > 0) & (total > 0).all(-1), found, 0.0)


def chrf_of(sums: np.ndarray, beta: float = 2) -> np.ndarray:
    """(..., 18) n-grams of replies, of references and matched ones, for each order -> (...) chrF."""
    said, reference, matched = (sums[..., place::3] for place in (0, 1, 2))
    used = (said > 0) & (reference > 0)
    orders = np.maximum(used.sum(-1), 1)
    precision, recall = (np.where(used, matched / np.maximum(of, 1), 0).sum(-1) / orders for of in (said, reference))
    below = beta**2 * precision + recall
    return np.where(below > 0, 100 * (1 + beta**2) * precision * recall / np.where(below > 0, below, 1), 0.0)
