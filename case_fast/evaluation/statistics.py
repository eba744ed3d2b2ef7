"""Is one system better than another? Intervals over seeds, and tests over the conversations of a test set.

The unit is the conversation, never the turn: turns of one conversation depend on each other. Everything drawn comes from fixed
streams (Philox), so that a table computed twice is the same. Methods: Student's t over seeds; the percentile bootstrap and the
exchange of two systems in random conversations for what sums over replies decide, such as means and BLEU (Koehn, 2004; Noreen,
1989); for what they do not, such as Dist-n, whose bootstrap is biased, since what is drawn twice is a duplicate, random halves
of the conversations and approximate randomization; Holm (1979) over several comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from case_fast.evaluation.metrics import n_grams

DRAWS = 10_000
HALVES = 200
_SEED = 20230701
_AT_ONCE = 500  # draws whose numbers are in memory together


def _stream(place: int) -> np.random.Generator:
    """A stream of its own for each kind of test: equal data give equal numbers."""
    return np.random.Generator(np.random.Philox(key=_SEED + place))


@dataclass(frozen=True)
class Interval:
    """A mean over n runs; sd, low and high (95 %) are None for a single one, which tells nothing of its spread."""

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None


def over_seeds(values: Sequence[float], level: float = 0.95) -> Interval:
    """mean +- t(n - 1) sd / sqrt(n)."""
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ValueError("no value to take a mean of")
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return Interval(mean, 1)
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(mean, n, sd, mean - half, mean + half)


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of Welch's t test that two systems' values over seeds have one mean; None with fewer than two seeds of either."""
    if min(len(a), len(b)) < 2:
        return None
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.std() == 0 and y.std() == 0:  # nothing varies: they are equal, or they are not
        return 1.0 if x[0] == y[0] else 0.0
    return float(stats.ttest_ind(x, y, equal_var=False).pvalue)


@dataclass(frozen=True)
class Difference:
    """A system's value less the other's, p that there is no difference, and the 95 % interval; None where a method has none."""

    value: float
    p: float | None
    low: float | None = None
    high: float | None = None


# ---- sums over conversations


def resampled(sums: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """(C, K) sums over each conversation -> (draws, K) sums over as many conversations, drawn with replacement.

    The same draws for all with as many conversations: differences of what is made of them are paired.
    """
    count = len(sums)
    generator, found = _stream(0), []
    for start in range(0, draws, _AT_ONCE):
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=min(_AT_ONCE, draws - start))
        found.append(drawn.astype(np.float64) @ sums)
    return np.concatenate(found)


def exchanged(a: np.ndarray, b: np.ndarray, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """(C, K) sums of two systems over each conversation -> (draws, K) twice, where both change places in random conversations."""
    generator, found, total = _stream(1), [], a.sum(0) + b.sum(0)
    for start in range(0, draws, _AT_ONCE):
        stays = generator.integers(0, 2, size=(min(_AT_ONCE, draws - start), len(a)), dtype=np.int8).astype(np.float64)
        found.append(b.sum(0) + stays @ (a - b))
    one = np.concatenate(found)
    return one, total - one


def percentiles(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that ``level`` of the draws lie in."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_as_large(found: np.ndarray, value: float) -> float:
    """Two-sided p: the share of draws that are as far from 0 as what was observed, which is counted among them."""
    extreme = int((np.abs(found) >= abs(value) * (1 - 1e-12)).sum())  # rounding must not make a tie a miss
    return (1 + extreme) / (1 + len(found))


def paired_means(a: np.ndarray, b: np.ndarray, weight: np.ndarray, draws: int = DRAWS, level: float = 0.95) -> Difference:
    """The difference of sum(a) / sum(weight) and sum(b) / sum(weight), both measured on the same conversations.

    Args:
        a, b (C,): each system's sum over a conversation, of replies' mean -log P or of right emotions, averaged over seeds.
        weight (C,): how many replies each conversation has.

    The interval is that of the percentile bootstrap over conversations; p is two-sided, of ``draws`` random exchanges of a and b
    in conversations, the one at hand counted among them.
    """
    d, weight = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    drawn = resampled(np.stack([d, weight], axis=1), draws)
    low, high = percentiles(drawn[:, 0] / drawn[:, 1], level)
    one, other = exchanged(d[:, None], np.zeros((len(d), 1)), draws)
    return Difference(float(d.sum() / weight.sum()), share_as_large(one - other, d.sum()), low, high)


# ---- parts of the conversations


def halves(count: int, draws: int = HALVES) -> Iterator[np.ndarray]:
    """Masks (count,) of a random half of the conversations, one a draw; the same for all with as many conversations."""
    generator, chosen = _stream(3), np.arange(count) < count // 2
    for _ in range(draws):
        yield generator.permutation(chosen)


def scaled(values: np.ndarray, whole: float) -> np.ndarray:
    """What was found in each half -> draws around what was found in the whole, as far from it in proportion as halves are from
    their mean. For a mean that is its standard error: a half of n without replacement varies as n with replacement do."""
    mean = values.mean()
    return whole * values / mean if mean else np.full(len(values), whole)


def about(whole: float, values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """whole +- z sd of its draws."""
    half = float(stats.norm.ppf((1 + level) / 2) * values.std(ddof=1))
    return whole - half, whole + half


def as_far(whole: float, values: np.ndarray) -> float:
    """Two-sided p of a normal distribution with the draws' sd: how often it is as far from 0 as the whole."""
    sd = float(values.std(ddof=1))
    return float(2 * stats.norm.sf(abs(whole) / sd)) if sd else float(whole == 0)


# ---- how many different things are said


Replies = Sequence[Sequence[Hashable]]


def distinct_difference(a: Sequence[Replies], b: Sequence[Replies], conversation: Sequence[int], n: int, draws: int = DRAWS
                        ) -> Difference:
    """The difference of two systems' Dist-n, each averaged over seeds, with p by approximate randomization.

    Args:
        a, b: of each seed, the words of every reply; as many seeds of both, the same examples in one order.
        conversation: the conversation (from 0) that each example belongs to. In a draw the two systems' replies of a conversation
            change places or stay, in all seeds at once.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"both systems need the same seeds, and have {len(a)} and {len(b)}")
    conversations = np.asarray(conversation)
    count = int(conversations.max()) + 1
    tables = [_grams(x, y, conversations, count, n) for x, y in zip(a, b, strict=True)]

    def difference(swapped: np.ndarray) -> np.ndarray:
        """(draws,) of Dist-n, where ``swapped`` (draws, C) says who changes places."""
        stays, total = 1.0 - swapped, np.zeros(len(swapped))
        for mine, other, sizes in tables:
            for one, two, sign in ((mine, other, 1), (other, mine, -1)):
                distinct = ((one @ stays.T + two @ swapped.T) > 0).sum(0)
                words = stays @ sizes[0 if sign > 0 else 1] + swapped @ sizes[1 if sign > 0 else 0]
                total += sign * 100 * distinct / np.maximum(words, 1)
        return total / len(tables)

    whole = float(difference(np.zeros((1, count)))[0])
    generator, found = _stream(2), []
    for start in range(0, draws, _AT_ONCE):
        swapped = generator.integers(0, 2, size=(min(_AT_ONCE, draws - start), count), dtype=np.int8).astype(np.float64)
        found.append(difference(swapped))
    return Difference(whole, share_as_large(np.concatenate(found), whole))


def _grams(a: Replies, b: Replies, conversation: np.ndarray, count: int, n: int
           ) -> tuple[sparse.csr_array, sparse.csr_array, np.ndarray]:
    """Which n-grams each system says in which conversation, (G, C) twice, and how many it says there, (2, C)."""
    ids: dict[tuple[Hashable, ...], int] = {}
    said: list[tuple[list[int], list[int]]] = []
    sizes = np.zeros((2, count))
    for system, replies in enumerate((a, b)):
        rows, columns = [], []
        for place, words in zip(conversation.tolist(), replies, strict=True):
            for gram in n_grams(words, n):
                rows.append(ids.setdefault(gram, len(ids)))
                columns.append(place)
                sizes[system, place] += 1
        said.append((rows, columns))
    mine, other = (
        sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(ids), count)) for rows, columns in said
    )
    return mine, other, sizes


def holm(p: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Adjusted p of several comparisons, by name: each may be read as if it were the only one."""
    adjusted, worst = {}, 0.0
    for place, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p) - place) * value))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p}
