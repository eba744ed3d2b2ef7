"""Is one system better than another? Intervals over seeds, and tests over the conversations of a test set.

The unit is the conversation, never the turn: turns of one conversation depend on each other. Everything drawn comes from fixed
streams (Philox), so that a table computed twice is the same. Methods: Student's t over seeds; the percentile bootstrap and the
sign-flip permutation test over conversations for means (Koehn, 2004; Noreen, 1989); approximate randomization for Dist-n, which
is no mean and whose bootstrap is biased, since what is drawn twice is a duplicate; Holm (1979) over several comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

DRAWS = 10_000
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
    """A system's value less the other's, its 95 % interval (None where a method has none), and p that there is no difference."""

    value: float
    p: float
    low: float | None = None
    high: float | None = None


def paired_means(a: np.ndarray, b: np.ndarray, weight: np.ndarray, draws: int = DRAWS, level: float = 0.95) -> Difference:
    """The difference of sum(a) / sum(weight) and sum(b) / sum(weight), both measured on the same conversations.

    Args:
        a, b (C,): each system's sum over a conversation, of replies' mean -log P or of right emotions, averaged over seeds.
        weight (C,): how many replies each conversation has.

    The interval is that of the percentile bootstrap over conversations; p is two-sided, of ``draws`` random exchanges of a and b
    in conversations, the one at hand counted among them.
    """
    d, weight = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    count, whole = len(d), float(d.sum() / weight.sum())
    generator, found = _stream(0), []
    for start in range(0, draws, _AT_ONCE):
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=min(_AT_ONCE, draws - start))
        found.append(drawn @ d / (drawn @ weight))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    generator, extreme, limit = _stream(1), 0, abs(d.sum()) * (1 - 1e-12)  # rounding must not make a tie a miss
    for start in range(0, draws, _AT_ONCE):
        signs = generator.integers(0, 2, size=(min(_AT_ONCE, draws - start), count), dtype=np.int8) * 2.0 - 1
        extreme += int((np.abs(signs @ d) >= limit).sum())
    return Difference(whole, (1 + extreme) / (1 + draws), float(low), float(high))


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
    generator, extreme, limit = _stream(2), 0, abs(whole) * (1 - 1e-12)
    for start in range(0, draws, _AT_ONCE):
        swapped = generator.integers(0, 2, size=(min(_AT_ONCE, draws - start), count), dtype=np.int8).astype(np.float64)
        extreme += int((np.abs(difference(swapped)) >= limit).sum())
    return Difference(whole, (1 + extreme) / (1 + draws))


def _grams(a: Replies, b: Replies, conversation: np.ndarray, count: int, n: int
           ) -> tuple[sparse.csr_array, sparse.csr_array, np.ndarray]:
    """Which n-grams each system says in which conversation, (G, C) twice, and how many it says there, (2, C)."""
    ids: dict[tuple[Hashable, ...], int] = {}
    said: list[tuple[list[int], list[int]]] = []
    sizes = np.zeros((2, count))
    for system, replies in enumerate((a, b)):
        rows, columns = [], []
        for place, words in zip(conversation.tolist(), replies, strict=True):
            for start in range(len(words) - n + 1):
                rows.append(ids.setdefault(tuple(words[start : start + n]), len(ids)))
                columns.append(place)
                sizes[system, place] += 1
        said.append((rows, columns))
    mine, other = (
        sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(ids), count)) for rows, columns in said
    )
    return mine, other, sizes


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p of several comparisons, by name: each may be read as if it were the only one."""
    adjusted, worst = {}, 0.0
    for place, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p) - place) * value))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p}
