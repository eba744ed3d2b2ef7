"""Eq. 9-12 and 20, mutual information maximisation: against loops over the printed sums, sampled negatives included."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import dot, gradcheck, normal, same, sigmoid, slow_philox
from scipy.stats import chisquare
from torch import Tensor

from case_fast import equations as eq


def slow_mim(
    x: Tensor, y: Tensor, weight: Tensor | None, positive: list[int], draws: tuple | None = None
) -> list[tuple[float, float]]:
    """(first sum's log - f, second sum's log - f) of each pair: the negated bracket of Eq. 9 / 11, term by term. Without a
    weight, f is the dot product."""
    if weight is None:
        f = [[dot(a, b) for b in y] for a in x]
    else:
        f = [[sigmoid(math.fsum(x[p, i] * weight[i, j] * y[q, j] for i in range(x.shape[1]) for j in range(y.shape[1])))
              for q in range(len(y))] for p in range(len(x))]
    losses = []
    for p, c in enumerate(positive):
        if draws is None:
            rows_y, rows_x = [q for q in range(len(y)) if q != c], [o for o in range(len(x)) if positive[o] != c]
        else:
            rows_y, rows_x = draws[0][p], draws[1][p]
        sum_y = math.exp(f[p][c]) + math.fsum(math.exp(f[p][q]) for q in rows_y)
        sum_x = math.exp(f[p][c]) + math.fsum(math.exp(f[o][c]) for o in rows_x)
        losses.append((math.log(sum_y) - f[p][c], math.log(sum_x) - f[p][c]))
    return losses


PAIRS = [  # rows of y, positive
    (1, [0]),
    (2, [0, 1]),
    (3, [0, 1, 2]),
    (7, list(range(7))),
    (1, [0, 0, 0]),
    (2, [1, 1, 1]),
    (5, [4, 0, 0, 2, 4, 4, 1]),
    (3, []),
    (0, []),
    (4, [3]),
    (11, [2, 2, 9, 10, 2, 0, 0, 5, 7, 3, 3, 3, 8]),
]


@pytest.mark.parametrize("score", eq.SCORES)
@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("rows, pairs", PAIRS)
def test_bilinear_mim(rows: int, pairs: list[int], k: int | None, score: str):
    x, y, positive = normal(len(pairs), 3), normal(rows, 3, seed=1), torch.tensor(pairs, dtype=torch.int64)
    weight = None if score == "dot" else normal(3, 3, seed=2)
    draws = slow_draws(pairs, rows, k, 99) if k else None
    expected = slow_mim(x, y, weight, pairs, draws)
    loss = [a + b for a, b in expected]
    same(eq.bilinear_mim(x, y, weight, positive, k, 99, "none", score), loss)
    same(eq.bilinear_mim(x, y, weight, positive, k, 99, "sum", score), math.fsum(loss))
    same(eq.bilinear_mim(x, y, weight, positive, k, 99, score=score), math.fsum(loss) / max(len(loss), 1))
    side_y, side_x, logit = eq.mim_sides(x, y, weight, positive, k, 99, score)
    same(side_y, [a for a, _ in expected])
    same(side_x, [b for _, b in expected])
    between = torch.eye(3).double() if weight is None else weight
    same(logit, [float(x[p] @ between @ y[c]) for p, c in enumerate(pairs)])
    negatives_y, negatives_x = eq.mim_negatives(positive, rows, k)
    found_y, found_x = rows - 1, [sum(o != c for o in pairs) for c in pairs]
    same(negatives_y, [min(found_y, 1) * k if k else found_y for _ in pairs])
    same(negatives_x, [min(n, 1) * k if k else n for n in found_x])
    # Eq. 20 with |Y~| = negatives + 1: E[f - log sum exp f] + log |Y~|
    sizes = [math.log(n + 1) for n in negatives_y.tolist()]
    same(
        eq.infonce_bound(side_y, negatives_y),
        math.fsum(s - a for s, (a, _) in zip(sizes, expected, strict=True)) / max(len(pairs), 1),
    )
    leaves = (x, y) if weight is None else (x, y, weight)
    gradcheck(lambda x, y, w=None: eq.bilinear_mim(x, y, w, positive, k, 99, score=score), *leaves)


# ---- vectors standardized over the batch


def slow_standardized(x: Tensor) -> Tensor:
    columns = []
    for column in x.T.tolist():
        mean = math.fsum(column) / len(column)
        variance = math.fsum((value - mean) ** 2 for value in column) / len(column)
        columns.append([(value - mean) / math.sqrt(variance + 1e-5) for value in column])
    return torch.tensor(columns, dtype=x.dtype).T


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("rows", [2, 5, 41])
def test_standardized(rows: int, spare: int):
    """The rows that exist by their own statistics: torch's batch norm in training; what fills up changes nothing."""
    x, count = normal(rows, 4) * 3 + 5, torch.tensor(rows)
    filled = torch.cat([x, normal(spare, 4, seed=1) * 100]).requires_grad_()
    found = eq.standardized(filled, count)[:rows]
    same(found, slow_standardized(x))
    same(found, F.batch_norm(x, None, None, training=True, eps=1e-5))
    upstream, leaf = normal(rows, 4, seed=2), x.clone().requires_grad_()
    expected = torch.autograd.grad((F.batch_norm(leaf, None, None, training=True, eps=1e-5) * upstream).sum(), leaf)[0]
    (gradient,) = torch.autograd.grad((found * upstream).sum(), filled)
    same(gradient[:rows], expected, 1e-10)
    assert (gradient[rows:] == 0).all()
    gradcheck(lambda x: eq.standardized(x, count)[:rows], filled.detach())


@pytest.mark.parametrize("spare", [0, 2])
def test_one_row_standardized_is_zero_and_so_is_its_gradient(spare: int):
    x = (normal(1 + spare, 3) * 1e3).float().requires_grad_()
    found = eq.standardized(x, torch.tensor(1))[:1]
    (gradient,) = torch.autograd.grad((found * torch.tensor([1.0, -2.0, 3.0])).sum(), x)
    assert (found == 0).all() and (gradient == 0).all()
    nothing = torch.zeros(0, 3, requires_grad=True)
    eq.standardized(nothing, torch.tensor(0)).sum().backward()
    assert nothing.grad.shape == (0, 3)
    assert eq.standardized(x, torch.tensor(0)).isfinite().all()


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("rows, pairs", PAIRS)
def test_gradients_through_standardized_scores(rows: int, pairs: list[int], k: int | None):
    """With rows behind those that exist."""
    sizes = torch.tensor([len(pairs), rows])
    positive = torch.tensor([*pairs, 0, 0], dtype=torch.int64)

    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        x, y = eq.standardized(x, sizes[0]), eq.standardized(y, sizes[1])
        return eq.bilinear_mim(x, y, weight / 3, positive, k, 99, sizes=sizes)

    x, y, weight = normal(len(pairs) + 2, 3), normal(rows + 1, 3, seed=1), normal(3, 3, seed=2)
    gradcheck(loss, x, y, weight)
    draws = slow_draws(pairs, rows, k, 99) if k else None
    mine = (slow_standardized(t[:n]) if n else t[:n] for t, n in ((x, len(pairs)), (y, rows)))
    expected = slow_mim(*mine, weight / 3, pairs, draws)
    same(loss(x, y, weight), math.fsum(a + b for a, b in expected) / max(len(pairs), 1))


@pytest.mark.parametrize("score", eq.SCORES)
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("rows, pairs", [(1, [0]), (1, [0, 0, 0])])
def test_without_negatives_loss_and_gradient_are_exactly_zero(rows: int, pairs: list[int], k: int | None, score: str):
    shapes = [(len(pairs), 4), (rows, 4), *([(4, 4)] if score != "dot" else [])]
    leaves = [normal(*shape, seed=s, scale=3).float().requires_grad_() for s, shape in enumerate(shapes)]
    x, y, weight = [*leaves, None][:3]
    loss = eq.bilinear_mim(x, y, weight, torch.tensor(pairs), k, 1, score=score)
    loss.backward()
    assert loss.item() == 0 and all((leaf.grad == 0).all() for leaf in leaves)
    with torch.no_grad():
        x[0] = math.nan
    nan = eq.bilinear_mim(x, y, weight, torch.tensor(pairs), k, 1, "none", score).isnan()
    assert nan[0] and not nan[1:].any()


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_mim_of_saturated_scores_is_finite(scale: float, k: int | None):
    x = torch.cat([torch.eye(4), -torch.eye(4)])
    leaves = [t.clone().requires_grad_() for t in (x, torch.ones(8, 4), torch.eye(4) * scale)]
    loss = eq.bilinear_mim(*leaves, None, k, 1, "none")
    loss.sum().backward()
    assert loss.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)
    assert eq.mim_sides(*leaves, torch.arange(8), k, 1)[2].abs().max() == scale


@pytest.mark.parametrize("k", [None, 3])
def test_dot_products_far_apart_keep_their_differences(k: int | None):
    """exp would overflow or vanish; the sums are taken from their maximum."""
    x = torch.eye(5).double() * 1e4
    far = eq.mim_sides(-x, torch.eye(5).double(), None, torch.arange(5), k, 1, "dot")
    near = eq.mim_sides(x, torch.eye(5).double(), None, torch.arange(5), k, 1, "dot")
    count = math.log(4 if k is None else k)
    same(far[0], [1e4 + count] * 5)
    same(far[1], [1e4 + count] * 5)
    assert not near[0].any() and not near[1].any()
    small = eq.mim_sides(x / 400, torch.eye(5).double(), None, torch.arange(5), k, 1, "dot")
    assert small[0].tolist() == pytest.approx([math.log1p((4 if k is None else k) * math.exp(-25))] * 5, rel=1e-10)


def test_mim_shows_nan_and_checks_its_arguments():
    x, y, weight = normal(4, 2), normal(4, 2, seed=1), normal(2, 2, seed=2)
    x[1, 0] = math.nan
    assert eq.bilinear_mim(x, y, weight, reduction="none").isnan().all()  # row 1 is a negative of all others
    with pytest.raises(ValueError, match="positive"):
        eq.bilinear_mim(x, y[:3], weight)
    for score, wrong in (("dot", weight), ("bilinear_sigmoid", None), ("cosine", weight)):
        with pytest.raises(ValueError, match="score"):
            eq.bilinear_mim(x, y, wrong, score=score)
    with pytest.raises(ValueError, match="reduction"):
        eq.bilinear_mim(x, y, weight, reduction="max")


def test_mim_is_small_where_pairs_match():
    """The loss is the bracket of Eq. 9 negated: it falls as pairs come to match, and is never below 0."""
    x, aligned = torch.eye(5, dtype=torch.float64) * 6, torch.eye(5, dtype=torch.float64) * 2 - 1
    weight = torch.eye(5, dtype=torch.float64)
    good, bad = (eq.bilinear_mim(x, y, weight, reduction="none") for y in (aligned, -aligned))
    assert (good < bad).all() and (good > 0).all()


def slow_draws(positive: list[int], rows_of_y: int, k: int, seed: int) -> tuple[list, list]:
    """The definition in words: slot by slot, pair by pair, side by side."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    over_y: list[list[int]] = []
    over_x: list[list[int]] = []
    for p, c in enumerate(positive):
        eligible = ([q for q in range(rows_of_y) if q != c], [o for o in range(len(positive)) if positive[o] != c])
        for side, (rows, drawn) in enumerate(zip(eligible, (over_y, over_x), strict=True)):
            words = [slow_philox((slot, p, side, 0), key)[0] for slot in range(k)]
            drawn.append([rows[(u * len(rows)) >> 32] for u in words] if rows else [])
    return over_y, over_x


@pytest.mark.parametrize("counter, key, expected", [  # Random123's known answers
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_philox_known_answers(counter: str, key: str, expected: str):
    c, k, e = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert eq.philox4x32(torch.tensor([c, c]), tuple(k)).tolist() == [e, e]
    assert list(slow_philox(tuple(c), tuple(k))) == e


@pytest.mark.parametrize("rows, pairs", PAIRS)
@pytest.mark.parametrize("seed", [0, 1, (7 << 32) + 5, (1 << 64) - 1])
def test_draw_negatives(rows: int, pairs: list[int], seed: int):
    k = 9
    over_y, over_x, found_y, found_x = eq.draw_negatives(torch.tensor(pairs, dtype=torch.int64), rows, k, seed)
    assert over_y.shape == over_x.shape == (len(pairs), k)
    slow_y, slow_x = slow_draws(pairs, rows, k, seed)
    for found, drawn, slow in ((found_y, over_y, slow_y), (found_x, over_x, slow_x)):
        assert found.tolist() == [bool(row) for row in slow]
        assert [row for row, there in zip(drawn.tolist(), found, strict=True) if there] == [row for row in slow if row]
        assert (drawn[~found] == 0).all()  # a row that exists, for the gather


def test_draws_are_uniform_and_differ():
    positive = torch.tensor([4, 0, 0, 2, 4, 4, 1])
    over_y, over_x, *_ = eq.draw_negatives(positive, 7, 20_000, seed=11)
    for p, c in enumerate(positive.tolist()):
        for drawn, rows in (
            (over_y, [q for q in range(7) if q != c]),
            (over_x, [o for o in range(7) if positive[o] != c]),
        ):
            counts = Counter(drawn[p].tolist())
            assert sorted(counts) == rows
            assert chisquare([counts[row] for row in rows]).pvalue > 1e-4
    words = [
        tuple(eq.draw_negatives(positive, 1 << 20, 4, seed)[0][p].tolist())
        for seed in (0, 1, 1 << 32)
        for p in range(7)
    ]
    assert len(set(words)) == 21  # no two pairs and no two seeds share their draws
    assert eq.draw_negatives(positive, 7, 6, 5)[0].equal(eq.draw_negatives(positive, 7, 9, 5)[0][:, :6])  # by counter


def test_group_sizes_and_reductions():
    assert eq.group_sizes(torch.tensor([2, 0, 2, 2]), 4).tolist() == [1, 0, 3, 0]
    assert eq.group_sizes(torch.zeros(0, dtype=torch.int64), 2).tolist() == [0, 0]
    loss = torch.tensor([1.0, 2, 6])
    assert eq.reduced(loss, "none") is loss
    assert (float(eq.reduced(loss, "sum")), float(eq.reduced(loss, "mean")), float(eq.reduced(loss[:0], "mean"))) == (9, 3, 0)
    with pytest.raises(ValueError, match="reduction must be mean, sum or none"):
        eq.reduced(loss, "median")
