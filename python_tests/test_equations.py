"""Every equation against loops written from the paper and from hand calculation, its gradient, and its behaviour at the edges."""

from __future__ import annotations

import ast
import inspect
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import random_csr
from scipy.stats import chisquare
from torch import Tensor

from case_fast import equations as eq

EXACT = 1e-12  # float64 against loops in another order of summation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale


def same(actual: Tensor, expected: object, tolerance: float = EXACT) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).reshape(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Analytic against numerical gradients with respect to all ``inputs`` (float64)."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    if any(leaf.numel() for leaf in leaves):
        assert torch.autograd.gradcheck(function, leaves)
    else:
        function(*leaves).sum().backward()
    grads = torch.autograd.grad(function(*leaves).sum(), leaves)
    assert all(g.shape == leaf.shape and g.isfinite().all() for g, leaf in zip(grads, leaves, strict=True))


def softmax(values: list[float]) -> list[float]:
    peak = max(values)
    terms = [math.exp(v - peak) for v in values]
    return [t / math.fsum(terms) for t in terms]


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def test_every_public_function_is_tested_here():
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "eq"}
    public = {name for name, f in inspect.getmembers(eq, inspect.isfunction) if f.__module__ == eq.__name__ and name[0] != "_"}
    assert public and public <= used


# ---------------------------------------------------------------------------------------------------------------- ragged rows

SIZES = [[0], [1], [3, 0, 2], [0, 0, 5, 0], [7, 1, 0, 11, 13], []]


@pytest.mark.parametrize("sizes", SIZES)
def test_segments(sizes: list[int]):
    cu, total = offsets(sizes), sum(sizes)
    segment = eq.segment_ids(cu, total)
    assert segment.tolist() == [s for s, n in enumerate(sizes) for _ in range(n)]
    assert eq.segment_ids(cu.int(), total).equal(segment)
    assert eq.segment_positions(cu, total).tolist() == [j for n in sizes for j in range(n)]
    x = normal(total, 3)
    parts = x.split(sizes) if sizes else []
    same(eq.segment_sum(x, segment, len(sizes)), [part.sum(0).tolist() for part in parts] or torch.zeros(0, 3))
    same(eq.segment_mean(x, segment, len(sizes)), [part.sum(0).div(max(len(part), 1)).tolist() for part in parts] or torch.zeros(0, 3))
    log_p = eq.segment_log_softmax(x, segment, len(sizes))
    columns = [[math.log(p) for p in softmax(part[:, c].tolist())] for c in range(3) for part in parts if len(part)]
    same(log_p.T.flatten(), [value for column in columns for value in column])
    for function in (eq.segment_sum, eq.segment_mean, eq.segment_log_softmax):
        gradcheck(lambda v, f=function: f(v, segment, len(sizes)), x)


def test_segments_in_any_order():
    segment = torch.tensor([2, 0, 2, 0, 3])
    same(eq.segment_mean(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64), segment, 5), [3.0, 0, 2, 5, 0])
    same(eq.segment_log_softmax(torch.zeros(5, dtype=torch.float64), segment, 5).exp(), [0.5, 0.5, 0.5, 0.5, 1])


@pytest.mark.parametrize("dtype, huge", [(torch.float32, 1e30), (torch.float64, 1e300)])
def test_log_softmax_of_huge_scores(dtype: torch.dtype, huge: float):
    score = torch.tensor([huge, huge, -huge, -huge, 0, -huge], dtype=dtype, requires_grad=True)
    log_p = eq.segment_log_softmax(score, torch.tensor([0, 0, 0, 1, 2, 2]), 4)
    same(log_p.exp(), [0.5, 0.5, 0, 1, 1, 0], 1e-6)
    (log_p.exp() * torch.arange(6, dtype=dtype)).sum().backward()
    assert score.grad.isfinite().all()


def test_empty_segments_leave_no_nan_anywhere_in_the_backward():
    score = normal(3).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # a NaN in a gradient that nobody reads is still a false alarm
        eq.segment_log_softmax(score, torch.tensor([0, 0, 2]), 4).sum().backward()


def test_a_nan_stays_in_its_own_segment():
    score = normal(6)
    segment = torch.tensor([0, 0, 1, 1, 2, 2])
    spoiled = score.clone()
    spoiled[2] = math.nan
    for function in (eq.segment_sum, eq.segment_mean, eq.segment_log_softmax):
        clean, dirty = function(score, segment, 3), function(spoiled, segment, 3)
        own = dirty.isnan()
        assert own.any() and dirty[~own].equal(clean[~own])
        assert own.sum() == (1 if len(dirty) == 3 else 2)


def test_take_and_full_precision():
    x = normal(5, 2)
    index = torch.tensor([[4, 0], [1, 1], [3, 2]])
    assert eq.take(x, index).equal(x[index]) and eq.take(x, index.int()).equal(x[index])
    assert eq.take(x, torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 2)
    assert eq.take(x[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 2)
    for half in (torch.float16, torch.bfloat16):
        assert eq.full_precision(x.to(half)).dtype == torch.float32
    assert eq.full_precision(x) is x


# ------------------------------------------------------------------------------------------------------------ graphs, Eq. 1-2


@pytest.mark.parametrize("dimension", [1, 2, 5, 8])
def test_sinusoidal_position(dimension: int):
    half = (dimension + 1) // 2
    rates = [10_000 ** -(i / max(half - 1, 1)) for i in range(half)]
    expected = [([math.sin(p * r) for r in rates] + [math.cos(p * r) for r in rates])[:dimension] for p in (0, 1, 2, 1999)]
    position = torch.tensor([0, 1, 2, 1999])
    same(eq.sinusoidal_position(position, dimension, torch.float64), expected, 1e-9)
    same(eq.sinusoidal_position(position, dimension), expected, 1999 * 2**-24)  # an angle rounded to float32
    assert eq.sinusoidal_position(position, dimension, torch.bfloat16).dtype == torch.bfloat16
    assert eq.sinusoidal_position(position[:0], dimension).shape == (0, dimension)


def test_emotion_intensity():
    # (‖(v, a/2) - (0.5, 0)‖ - 0.06467) / 0.607468 by hand: a 3-4-5 triangle, a neutral word, the strongest one
    v, a = torch.tensor([0.8, 0.5, 1.0], dtype=torch.float64), torch.tensor([0.8, 0.0, 1.0], dtype=torch.float64)
    same(eq.emotion_intensity(v, a), [(0.5 - 0.06467) / 0.607468, -0.06467 / 0.607468, (math.sqrt(0.5) - 0.06467) / 0.607468])


def slow_graph_attention(q, k, v, indptr, indices, relation, relation_query, relation_key, scale) -> list:
    vertices, heads, dimension = q.shape
    scale = dimension**-0.5 if scale is None else scale
    out = [[[0.0] * dimension for _ in range(heads)] for _ in range(vertices)]
    for i in range(vertices):
        edges = range(int(indptr[i]), int(indptr[i + 1]))
        for h in range(heads):
            scores = []
            for e in edges:
                qi, kk = q[i, h], k[int(indices[e]), h]
                if relation is not None:
                    qi, kk = qi + relation_query[int(relation[e]), h], kk + relation_key[int(relation[e]), h]
                scores.append(scale * dot(qi, kk))
            for e, p in zip(edges, softmax(scores) if scores else [], strict=True):
                for c in range(dimension):
                    out[i][h][c] += p * float(v[int(indices[e]), h, c])
    return out


GRAPHS = [  # vertices, edges, heads, dimension, relations, share of isolated vertices
    (1, 0, 1, 1, 1, 0.0), (1, 1, 2, 3, 1, 0.0), (1, 7, 1, 2, 3, 0.0), (2, 5, 2, 3, 2, 0.0), (5, 0, 2, 3, 2, 0.0),
    (7, 13, 2, 5, 7, 0.3), (11, 37, 3, 2, 10, 0.5), (3, 40, 1, 4, 2, 0.0), (0, 0, 2, 3, 2, 0.0), (13, 29, 2, 1, 0, 0.2),
]  # fmt: skip


@pytest.mark.parametrize("shape", GRAPHS)
def test_graph_attention(shape: tuple):
    vertices, edges, heads, dimension, relations, isolated = shape
    indptr, indices, relation = random_csr(vertices, edges, generator(3), relations, isolated)
    q, k, v = (normal(vertices, heads, dimension, seed=s) for s in range(3))
    kind = relation if relations else None
    tables = (normal(relations, heads, dimension, seed=4), normal(relations, heads, dimension, seed=5)) if relations else (None, None)
    for scale in (None, 0.37):
        expected = slow_graph_attention(q, k, v, indptr, indices, kind, *tables, scale)
        same(eq.graph_attention(q, k, v, indptr, indices, kind, *tables, scale), torch.tensor(expected, dtype=torch.float64))
    leaves = (q, k, v, *tables) if relations else (q, k, v)
    gradcheck(lambda q, k, v, *t: eq.graph_attention(q, k, v, indptr, indices, kind, *t), *leaves)


def test_graph_attention_by_hand():
    # one vertex with two parallel edges to a neighbour and one to itself: the neighbour counts twice
    q = torch.zeros(2, 1, 1, dtype=torch.float64)
    v = torch.tensor([[[1.0]], [[4.0]]], dtype=torch.float64)
    indptr, indices = torch.tensor([0, 3, 3]), torch.tensor([0, 1, 1])
    same(eq.graph_attention(q, q, v, indptr, indices), [3.0, 0.0])  # (1 + 4 + 4) / 3; no neighbour: zero
    # l_q of relation 0 meets the key, l_k of relation 1 the query: scores 1 * (2 + 0) = 2 and (1 + 0) * (0 + 3) = 3 at scale 1
    q, k = torch.tensor([[[1.0]]], dtype=torch.float64), torch.tensor([[[2.0]]], dtype=torch.float64)
    v = torch.ones(1, 1, 1, dtype=torch.float64)
    rq, rk = torch.tensor([[[5.0]], [[0.0]]], dtype=torch.float64), torch.tensor([[[0.0]], [[3.0]]], dtype=torch.float64)
    two = torch.tensor([0, 2])
    q.requires_grad_()
    eq.graph_attention(q, k, v, two, torch.tensor([0, 0]), torch.tensor([0, 1]), rq, rk, scale=1.0).sum().backward()
    with pytest.raises(ValueError, match="relation_query"):
        eq.graph_attention(q, k, v, two, torch.tensor([0, 0]), torch.tensor([0, 1]))
    # (1 + 5) * 2 = 12 against (1 + 0) * (2 + 3) = 5
    v = torch.tensor([[[1.0]], [[0.0]]], dtype=torch.float64)
    q, k = torch.tensor([[[1.0]], [[1.0]]], dtype=torch.float64), torch.tensor([[[2.0]], [[2.0]]], dtype=torch.float64)
    out = eq.graph_attention(q, k, v, torch.tensor([0, 2, 2]), torch.tensor([0, 1]), torch.tensor([0, 1]), rq, rk, scale=1.0)
    same(out, [sigmoid(12 - 5), 0.0])


def test_graph_attention_dropout_keeps_the_mean():
    indptr, indices = torch.tensor([0, 3000]), torch.zeros(3000, dtype=torch.int64)
    x = torch.ones(1, 1, 1)
    out = eq.graph_attention(x, x, x, indptr, indices, dropout_p=0.25)
    assert out.item() != 1 and abs(out.item() - 1) < 0.1


def test_superimpose_intensity():
    same(eq.superimpose_intensity(torch.tensor([[1.0, -2], [3, 4]]), torch.tensor([0.5, 0.0])), [[1.5, -3], [3, 4]])


# ------------------------------------------------------------------------------------------------------ discernment, Eq. 3-8

KNOWLEDGE = [[4], [1, 3], [0, 5, 0, 2], [0, 0], [3, 1, 7]]


@pytest.mark.parametrize("sizes", KNOWLEDGE)
def test_discernment(sizes: list[int]):
    """Eq. 3 to 7 dialogue by dialogue; a dialogue without knowledge gives r = 0 and no KL."""
    d, dialogues = 3, len(sizes)
    segment = eq.segment_ids(offsets(sizes), sum(sizes))
    vectors, prior_signal, posterior_signal = normal(sum(sizes), d), normal(dialogues, d, seed=1), normal(dialogues, d, seed=2)
    log_p, log_q = (eq.discernment(vectors, s, segment) for s in (prior_signal, posterior_signal))
    p, q, r, kl, first = [], [], [], 0.0, 0
    for b, n in enumerate(sizes):
        rows = vectors[first : first + n]
        first += n
        mine = [softmax([dot(row, signal[b]) for row in rows]) if n else [] for signal in (prior_signal, posterior_signal)]
        p, q = p + mine[0], q + mine[1]
        r.append([math.fsum(w * row[c] for w, row in zip(mine[0], rows.tolist(), strict=True)) for c in range(d)])
        kl += sum(b_ * math.log(b_ / a_) for a_, b_ in zip(*mine, strict=True))
    same(log_p.exp(), p)
    same(log_q.exp(), q)
    same(eq.expected_knowledge(log_p, vectors, segment, dialogues), r)
    same(eq.discernment_kl(log_q, log_p, dialogues), kl / dialogues)
    assert eq.discernment_kl(log_q, log_p, dialogues) >= 0 and eq.discernment_kl(log_p, log_p, dialogues) == 0

    def whole(vectors: Tensor, a: Tensor, b: Tensor) -> Tensor:
        log_p, log_q = eq.discernment(vectors, a, segment), eq.discernment(vectors, b, segment)
        return eq.discernment_kl(log_q, log_p, dialogues) + eq.expected_knowledge(log_p, vectors, segment, dialogues).square().sum()

    gradcheck(whole, vectors, prior_signal, posterior_signal)


def test_detaching_the_posterior_is_left_to_the_caller():
    log_q, log_p = (eq.discernment(normal(4, 2), normal(1, 2, seed=s).requires_grad_(), torch.zeros(4).long()) for s in (1, 2))
    grads = torch.autograd.grad(eq.discernment_kl(log_q, log_p, 1), (log_q, log_p))
    assert all(g.abs().sum() > 0 for g in grads)


def test_bow_loss():
    log_eta = torch.log_softmax(normal(3, 5), -1)
    replies = [[1, 1, 4], [3], [0, 2]]  # a multiset: the repeated word counts twice
    target = torch.tensor([word for reply in replies for word in reply])
    segment = eq.segment_ids(offsets([3, 1, 2]), 6)
    means = [sum(-float(log_eta[b, w]) for w in reply) / len(reply) for b, reply in enumerate(replies)]
    same(eq.bow_loss(log_eta, target, segment), sum(means) / 3)
    gradcheck(lambda x: eq.bow_loss(torch.log_softmax(x, -1), target, segment), normal(3, 5))


# ---------------------------------------------------------------------------------------------------------- MIM, Eq. 9-12, 20


def slow_mim(x: Tensor, y: Tensor, weight: Tensor, positive: list[int], draws: tuple | None = None) -> list[tuple[float, float]]:
    """(first sum's log - f, second sum's log - f) of each pair: the negated bracket of Eq. 9 / 11, term by term."""
    f = [[sigmoid(math.fsum(x[p, i] * weight[i, j] * y[q, j] for i in range(x.shape[1]) for j in range(y.shape[1])))
          for q in range(len(y))] for p in range(len(x))]  # fmt: skip
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
    (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, list(range(7))), (1, [0, 0, 0]), (2, [1, 1, 1]), (5, [4, 0, 0, 2, 4, 4, 1]),
    (3, []), (0, []), (4, [3]), (11, [2, 2, 9, 10, 2, 0, 0, 5, 7, 3, 3, 3, 8]),
]  # fmt: skip


@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("rows, pairs", PAIRS)
def test_bilinear_mim(rows: int, pairs: list[int], k: int | None):
    x, y, weight, positive = normal(len(pairs), 3), normal(rows, 3, seed=1), normal(3, 3, seed=2), torch.tensor(pairs, dtype=torch.int64)
    draws = slow_draws(pairs, rows, k, 99) if k else None
    expected = slow_mim(x, y, weight, pairs, draws)
    loss = [a + b for a, b in expected]
    same(eq.bilinear_mim(x, y, weight, positive, k, 99, "none"), loss)
    same(eq.bilinear_mim(x, y, weight, positive, k, 99, "sum"), math.fsum(loss))
    same(eq.bilinear_mim(x, y, weight, positive, k, 99), math.fsum(loss) / max(len(loss), 1))
    side_y, side_x, logit, negatives_y, negatives_x = eq.mim_sides(x, y, weight, positive, k, 99)
    same(side_y, [a for a, _ in expected])
    same(side_x, [b for _, b in expected])
    same(logit, [float(x[p] @ weight @ y[c]) for p, c in enumerate(pairs)])
    same(logit, eq.bilinear_logit(x, y[positive], weight))
    found_y, found_x = rows - 1, [sum(o != c for o in pairs) for c in pairs]
    same(negatives_y, [min(found_y, 1) * k if k else found_y for _ in pairs])
    same(negatives_x, [min(n, 1) * k if k else n for n in found_x])
    # Eq. 20 with |Y~| = negatives + 1: E[f - log sum exp f] + log |Y~|
    sizes = [math.log(n + 1) for n in negatives_y.tolist()]
    same(eq.infonce_bound(side_y, negatives_y), math.fsum(s - a for s, (a, _) in zip(sizes, expected, strict=True)) / max(len(pairs), 1))
    gradcheck(lambda x, y, w: eq.bilinear_mim(x, y, w, positive, k, 99), x, y, weight)


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("rows, pairs", [(1, [0]), (1, [0, 0, 0])])
def test_without_negatives_loss_and_gradient_are_exactly_zero(rows: int, pairs: list[int], k: int | None):
    leaves = [normal(*shape, seed=s, scale=3).float().requires_grad_() for s, shape in enumerate([(len(pairs), 4), (rows, 4), (4, 4)])]
    loss = eq.bilinear_mim(*leaves, torch.tensor(pairs), k, 1)
    loss.backward()
    assert loss.item() == 0 and all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_mim_of_saturated_scores_is_finite(scale: float, k: int | None):
    x = torch.cat([torch.eye(4), -torch.eye(4)])
    leaves = [t.clone().requires_grad_() for t in (x, torch.ones(8, 4), torch.eye(4) * scale)]
    loss = eq.bilinear_mim(*leaves, None, k, 1, "none")
    loss.sum().backward()
    assert loss.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)
    assert eq.mim_sides(*leaves, torch.arange(8), k, 1)[2].abs().max() == scale


def test_mim_shows_nan_and_checks_its_arguments():
    x, y, weight = normal(4, 2), normal(4, 2, seed=1), normal(2, 2, seed=2)
    x[1, 0] = math.nan
    assert eq.bilinear_mim(x, y, weight, reduction="none").isnan().all()  # row 1 is a negative of all others
    with pytest.raises(ValueError, match="positive"):
        eq.bilinear_mim(x, y[:3], weight)
    with pytest.raises(ValueError, match="reduction"):
        eq.bilinear_mim(x, y, weight, reduction="max")


def test_mim_is_small_where_pairs_match():
    """The loss is the bracket of Eq. 9 negated: aligned pairs have less of it than misaligned ones, and never less than 0."""
    x, aligned = torch.eye(5, dtype=torch.float64) * 6, torch.eye(5, dtype=torch.float64) * 2 - 1
    weight = torch.eye(5, dtype=torch.float64)
    good, bad = (eq.bilinear_mim(x, y, weight, reduction="none") for y in (aligned, -aligned))
    assert (good < bad).all() and (good > 0).all()


def slow_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


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
])  # fmt: skip
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
        for drawn, rows in ((over_y, [q for q in range(7) if q != c]), (over_x, [o for o in range(7) if positive[o] != c])):
            counts = Counter(drawn[p].tolist())
            assert sorted(counts) == rows
            assert chisquare([counts[row] for row in rows]).pvalue > 1e-4
    words = [tuple(eq.draw_negatives(positive, 1 << 20, 4, seed)[0][p].tolist()) for seed in (0, 1, 1 << 32) for p in range(7)]
    assert len(set(words)) == 21  # no two pairs and no two seeds share their draws
    assert eq.draw_negatives(positive, 7, 6, 5)[0].equal(eq.draw_negatives(positive, 7, 9, 5)[0][:, :6])  # by counter


# ------------------------------------------------------------------------------------------- losses and affect, Eq. 13-17, 19


def test_affect():
    """Eq. 14-17 for each dialogue by itself."""
    r_emo, er_0, w_aff, w_emo = normal(3, 4), normal(3, 4, seed=1), normal(8, seed=2), normal(5, 4, seed=3)
    mu = eq.affect_gate(r_emo, er_0, w_aff)
    r_aff = eq.affect(r_emo, er_0, mu)
    log_p = eq.emotion_log_probability(r_aff, w_emo)
    labels = [4, 0, 2]
    nll = []
    for b in range(3):
        gate = sigmoid(dot(torch.cat([r_emo[b], er_0[b]]), w_aff))
        same(mu[b], gate)
        same(r_aff[b], [gate * r + (1 - gate) * e for r, e in zip(r_emo[b].tolist(), er_0[b].tolist(), strict=True)])
        p = softmax([dot(row, r_aff[b]) for row in w_emo])
        same(log_p[b].exp(), p)
        nll.append(-math.log(p[labels[b]]))
    same(eq.emotion_loss(log_p, torch.tensor(labels)), sum(nll) / 3)

    def whole(r_emo: Tensor, er_0: Tensor, w_aff: Tensor, w_emo: Tensor) -> Tensor:
        r = eq.affect(r_emo, er_0, eq.affect_gate(r_emo, er_0, w_aff))
        return eq.emotion_loss(eq.emotion_log_probability(r, w_emo), torch.tensor(labels))

    gradcheck(whole, r_emo, er_0, w_aff, w_emo)


def test_fuse_context():
    context, cog, aff, weight, bias = normal(5, 2), normal(2, 2, seed=1), normal(2, 2, seed=2), normal(2, 6, seed=3), normal(2, seed=4)
    segment = torch.tensor([0, 0, 0, 1, 1])
    fused = eq.fuse_context(context, cog, aff, segment, weight, bias)
    for i, b in enumerate(segment.tolist()):
        row = torch.cat([context[i], cog[b], aff[b]])
        same(fused[i], [max(0.0, dot(weight[c], row) + float(bias[c])) for c in range(2)])
    assert (fused == 0).any() and (fused > 0).any()
    gradcheck(lambda *a: eq.fuse_context(*a[:3], segment, *a[3:]), context, cog, aff, weight, bias)


def test_cross_entropy_and_generation_loss():
    hidden, weight, bias, target = normal(4, 3), normal(6, 3, seed=1), normal(6, seed=2), torch.tensor([0, 5, 3, 3])
    nll, prediction, logits = eq.linear_cross_entropy(hidden, weight, bias, target)
    for t, word in enumerate(target.tolist()):
        scores = [dot(weight[w], hidden[t]) + float(bias[w]) for w in range(6)]
        same(logits[t], scores)
        same(nll[t], -math.log(softmax(scores)[word]))
        assert prediction[t] == scores.index(max(scores))
    same(eq.generation_loss(nll), math.fsum(nll.tolist()) / 4)  # averaged, not summed as Eq. 19 is printed
    assert eq.generation_loss(nll[:0]) == 0
    tied = torch.zeros(1, 3)
    assert eq.linear_cross_entropy(tied, torch.zeros(6, 3), torch.tensor([0.0, 1, 1, 0, 1, 0]), target[:1])[1].item() == 1
    gradcheck(lambda *a: eq.generation_loss(eq.linear_cross_entropy(*a, target)[0]), hidden, weight, bias)


def test_diversity():
    # counts 6 3 0 3: RF / max RF = 1, .5, 0, .5, so 1 - it = 0, .5, 1, .5, of mean .5, which rescaled to 1 doubles them
    weights = eq.diversity_weights(torch.tensor([6, 3, 0, 3]))
    same(weights, [0.0, 1, 2, 1])
    for even in ([0, 0, 0], [5, 5, 5]):
        same(eq.diversity_weights(torch.tensor(even)), [1.0, 1, 1])
    nll, target = torch.tensor([1.0, 2, 4], dtype=torch.float64), torch.tensor([2, 0, 1])
    same(eq.diversity_loss(nll, target, weights), (2 * 1 + 0 * 2 + 1 * 4) / 3)
    assert eq.diversity_loss(nll[:0], target[:0], weights) == 0
    large = eq.diversity_weights(torch.tensor([2**62, 2**61, 0]))  # no overflow after any number of steps
    same(large, [0.0, 1, 2])
    gradcheck(lambda x: eq.diversity_loss(x, target, weights), nll)


def test_sums_of_losses():
    bow, kl, coarse, fine, emotion, generation, diversity = (torch.tensor(float(v), dtype=torch.float64) for v in (1, 2, 4, 8, 16, 32, 64))
    alignment = eq.alignment_loss(bow, kl, coarse, fine, 0.2)
    same(alignment, 1 + 2 + 4 + 0.2 * 8)
    same(eq.total_loss(alignment, emotion, generation, diversity, (1.0, 1.0, 1.0, 1.5)), 8.6 + 16 + 32 + 96)
    same(eq.total_loss(alignment, emotion, generation, diversity, (0.5, 2.0, 3.0, 0.0)), 4.3 + 32 + 96)


# --------------------------------------------------------------------------------------------------------- packed attention

SEQUENCES = [  # lengths of queries, lengths of keys
    ([1], [1]), ([3], [5]), ([2, 1, 7], [2, 1, 7]), ([4, 2], [0, 3]), ([3, 1], [0, 0]), ([0, 2], [3, 1]), ([0], [0]),
    ([1, 2, 3, 4, 5, 8, 9], [9, 8, 5, 4, 3, 2, 1]), ([13, 17], [17, 13]),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows, keys", SEQUENCES)
def test_packed_attention(rows: list[int], keys: list[int], causal: bool):
    heads, d = 2, 3
    q, k, v = normal(sum(rows), heads, d), normal(sum(keys), heads, d, seed=1), normal(sum(keys), heads, d, seed=2)
    cu_q, cu_k = offsets(rows), offsets(keys)
    for scale in (None, 1.3):
        expected = torch.zeros_like(q)
        for s, (n, m) in enumerate(zip(rows, keys, strict=True)):
            for i in range(n):
                seen = [int(cu_k[s]) + j for j in range(min(m, i + 1) if causal else m)]
                for h in range(heads if seen else 0):
                    row = q[cu_q[s] + i, h]
                    p = softmax([(d**-0.5 if scale is None else scale) * dot(row, k[j, h]) for j in seen])
                    expected[cu_q[s] + i, h] = sum(w * v[j, h] for w, j in zip(p, seen, strict=True))
        same(eq.packed_attention(q, k, v, cu_q, cu_k, causal, scale), expected)
    gradcheck(lambda *a: eq.packed_attention(*a, cu_q, cu_k, causal), q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_attention_does_not_depend_on_the_batch(dtype: torch.dtype):
    rng = random.Random(0)
    rows, keys = [rng.randint(1, 40) for _ in range(24)], [rng.randint(0, 40) for _ in range(24)]
    q, k, v = (t.to(dtype) for t in (normal(sum(rows), 2, 5), normal(sum(keys), 2, 5, seed=1), normal(sum(keys), 2, 5, seed=2)))
    together = eq.packed_attention(q, k, v, offsets(rows), offsets(keys)).split(rows)
    for s, (a, b, c) in enumerate(zip(q.split(rows), k.split(keys), v.split(keys), strict=True)):
        alone = eq.packed_attention(a, b, c, offsets([rows[s]]), offsets([keys[s]]))
        same(alone, together[s], 1e-6 if dtype == torch.float32 else 1e-14)
    spoiled = k.clone()
    spoiled[offsets(keys)[3]] = math.nan  # a sequence's NaN is its own
    dirty = eq.packed_attention(q, spoiled, v, offsets(rows), offsets(keys)).split(rows)
    assert keys[3] and dirty[3].isnan().all()
    assert all(a.equal(b) for s, (a, b) in enumerate(zip(dirty, together, strict=True)) if s != 3)


# -------------------------------------------------------------------------------------------------------------------- dtypes


def _star(vertices: int) -> tuple[Tensor, Tensor]:
    """A hub joined to all vertices; each other vertex joined to the hub."""
    indices = torch.cat([torch.arange(vertices), torch.zeros(vertices - 1, dtype=torch.int64)])
    return torch.tensor([0, *range(vertices, 2 * vertices)]), indices


SEGMENT = torch.tensor([0] * 700 + [1] * 3 + [3])
PRECISION: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "segment_sum": (lambda x: eq.segment_sum(x, SEGMENT, 4) / 700, [normal(704, 3) + 1]),
    "segment_mean": (lambda x: eq.segment_mean(x, SEGMENT, 4), [normal(704, 3) + 1]),
    "segment_log_softmax": (lambda x: eq.segment_log_softmax(x, SEGMENT, 4), [normal(704, scale=4)]),
    "graph_attention": (lambda q, k, v: eq.graph_attention(q, k, v, *_star(700)), [normal(700, 2, 5, seed=s) for s in range(3)]),
    "graph_attention, constant values": (
        lambda q, k, v: eq.graph_attention(q, k, v, *_star(700)), [normal(700, 2, 5) * 0.1, normal(700, 2, 5, seed=1), normal(700, 2, 5) * 0 + 1]
    ),
    "discernment": (lambda v, s: eq.discernment(v, s, SEGMENT), [normal(704, 3), normal(4, 3, seed=1)]),
    "expected_knowledge": (
        lambda v, s: eq.expected_knowledge(eq.discernment(v, s, SEGMENT), v, SEGMENT, 4), [normal(704, 3), normal(4, 3, seed=1)]
    ),
    "bilinear_mim": (lambda x, y, w: eq.bilinear_mim(x, y, w, reduction="none"), [normal(300, 8, seed=s) for s in (0, 1)] + [normal(8, 8) / 8]),
    "packed_attention": (
        lambda q, k, v: eq.packed_attention(q, k, v, offsets([3, 5]), offsets([700, 1])),
        [normal(8, 2, 5), normal(701, 2, 5, seed=1), normal(701, 2, 5, seed=2) + 1],
    ),
    "linear_cross_entropy": (
        lambda h, w, b: eq.linear_cross_entropy(h, w, b, torch.arange(40))[0], [normal(40, 16), normal(900, 16, seed=1), normal(900, seed=2)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRECISION)
def test_error_is_bounded_by_the_dtype(name: str, dtype: torch.dtype):
    """Against float64 on the same rounded inputs; the bound does not grow with the length of the sums."""
    function, inputs = PRECISION[name]
    rounded = [x.to(dtype) for x in inputs]
    out, truth = function(*rounded), function(*(x.double() for x in rounded))
    bound = 8 * torch.finfo(dtype).eps * truth.abs().max().clamp(min=1)
    assert (out.double() - truth).abs().max() <= bound
