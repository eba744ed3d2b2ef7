"""Every equation against loops written from the paper and against hand calculation; gradients; the edges.

MIM, Eq. 9-12 and 20, is in test_equations_mim.py; attention of packed sequences in test_equations_attention.py.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import dot, generator, gradcheck, normal, offsets, same, sigmoid, slow_philox, softmax
from op_cases.graph_attention import random_csr
from torch import Tensor

from case_fast import equations as eq


def test_every_public_function_is_tested_here():
    used = {
        node.attr
        for file in Path(__file__).parent.glob("test_equations*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "eq"
    }
    functions = inspect.getmembers(eq, inspect.isfunction)
    public = {name for name, function in functions if function.__module__ == eq.__name__ and name[0] != "_"}
    assert public and public <= used


# ---- ragged rows

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
    same(
        eq.segment_mean(x, segment, len(sizes)),
        [part.sum(0).div(max(len(part), 1)).tolist() for part in parts] or torch.zeros(0, 3),
    )
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


# ---- graphs, Eq. 1-2


@pytest.mark.parametrize("dimension", [1, 2, 5, 8])
def test_sinusoidal_position(dimension: int):
    half = (dimension + 1) // 2
    rates = [10_000 ** -(i / max(half - 1, 1)) for i in range(half)]
    expected = [
        ([math.sin(p * r) for r in rates] + [math.cos(p * r) for r in rates])[:dimension] for p in (0, 1, 2, 1999)
    ]
    position = torch.tensor([0, 1, 2, 1999])
    same(eq.sinusoidal_position(position, dimension, torch.float64), expected, 1e-9)
    same(eq.sinusoidal_position(position, dimension), expected, 1999 * 2**-24)  # an angle rounded to float32
    assert eq.sinusoidal_position(position, dimension, torch.bfloat16).dtype == torch.bfloat16
    assert eq.sinusoidal_position(position[:0], dimension).shape == (0, dimension)


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
]


@pytest.mark.parametrize("shape", GRAPHS)
def test_graph_attention(shape: tuple):
    vertices, edges, heads, dimension, relations, isolated = shape
    indptr, indices, relation = random_csr(vertices, edges, generator(3), relations, isolated)
    q, k, v = (normal(vertices, heads, dimension, seed=s) for s in range(3))
    kind = relation if relations else None
    tables = (
        (normal(relations, heads, dimension, seed=4), normal(relations, heads, dimension, seed=5))
        if relations
        else (None, None)
    )
    for scale in (None, 0.37):
        expected = slow_graph_attention(q, k, v, indptr, indices, kind, *tables, scale)
        same(
            eq.graph_attention(q, k, v, indptr, indices, kind, *tables, scale),
            torch.tensor(expected, dtype=torch.float64),
        )
    leaves = (q, k, v, *tables) if relations else (q, k, v)
    gradcheck(lambda q, k, v, *t: eq.graph_attention(q, k, v, indptr, indices, kind, *t), *leaves)


def test_graph_attention_by_hand():
    # one vertex with two parallel edges to a neighbour and one to itself: the neighbour counts twice
    q = torch.zeros(2, 1, 1, dtype=torch.float64)
    v = torch.tensor([[[1.0]], [[4.0]]], dtype=torch.float64)
    indptr, indices = torch.tensor([0, 3, 3]), torch.tensor([0, 1, 1])
    same(eq.graph_attention(q, q, v, indptr, indices), [3.0, 0.0])  # (1 + 4 + 4) / 3; no neighbour: zero
    # l_q belongs to the vertex, l_k to its neighbour: relation 0 gives (1 + 5) (2 + 0) = 12, relation 1 (1 + 0) (2 + 3) = 5
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(2, 1, 1) for x in ([1, 1], [2, 2], [1, 0]))
    tables = [torch.tensor(x, dtype=torch.float64).view(2, 1, 1) for x in ([5, 0], [0, 3])]
    edges, relation = (torch.tensor([0, 2, 2]), torch.tensor([0, 1])), torch.tensor([0, 1])
    same(eq.graph_attention(q, k, v, *edges, relation, *tables, scale=1.0), [sigmoid(12 - 5), 0.0])
    with pytest.raises(ValueError, match="relation_query"):
        eq.graph_attention(q, k, v, *edges, relation)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 1, 2**63 - 1])
def test_dropout_keep_is_philox_of_edge_and_head(seed: int):
    keep = eq.dropout_keep(5, 3, 0.3, seed, torch.device("cpu"))
    words = [[slow_philox((e, 0, h, 0), (seed & 0xFFFFFFFF, seed >> 32))[0] for h in range(3)] for e in range(5)]
    assert keep.tolist() == [[word >= int(0.3 * 2**32) for word in row] for row in words]


def test_graph_attention_dropout():
    indptr, indices = torch.tensor([0, 3000]), torch.zeros(3000, dtype=torch.int64)
    x = torch.ones(1, 2, 1, dtype=torch.float64)
    out = eq.graph_attention(x, x, x, indptr, indices, dropout_p=0.25, seed=5)
    kept = eq.dropout_keep(3000, 2, 0.25, 5, x.device).double().mean(0)  # 1/3000 of each kept weight, over 1 - p
    same(out, kept / 0.75)
    assert (kept - 0.75).abs().max() < 0.04  # five standard deviations
    assert not torch.equal(out, eq.graph_attention(x, x, x, indptr, indices, dropout_p=0.25, seed=6))


def test_superimpose_intensity():
    same(eq.superimpose_intensity(torch.tensor([[1.0, -2], [3, 4]]), torch.tensor([0.5, 0.0])), [[1.5, -3], [3, 4]])


# ---- discernment, Eq. 3-8

KNOWLEDGE = [[4], [1, 3], [0, 5, 0, 2], [0, 0], [3, 1, 7]]


@pytest.mark.parametrize("sizes", KNOWLEDGE)
def test_discernment(sizes: list[int]):
    """Eq. 3 to 7 dialogue by dialogue; a dialogue without knowledge gives r = 0 and no KL."""
    d, dialogues = 3, len(sizes)
    segment = eq.segment_ids(offsets(sizes), sum(sizes))
    vectors, prior_signal, posterior_signal = (
        normal(sum(sizes), d),
        normal(dialogues, d, seed=1),
        normal(dialogues, d, seed=2),
    )
    log_p, log_q = (eq.discernment(vectors, s, segment) for s in (prior_signal, posterior_signal))
    p, q, r, kl, first = [], [], [], 0.0, 0
    for b, n in enumerate(sizes):
        rows = vectors[first : first + n]
        first += n
        mine = [
            softmax([dot(row, signal[b]) for row in rows]) if n else [] for signal in (prior_signal, posterior_signal)
        ]
        p, q = p + mine[0], q + mine[1]
        r.append([math.fsum(w * row[c] for w, row in zip(mine[0], rows.tolist(), strict=True)) for c in range(d)])
        kl += sum(b_ * math.log(b_ / a_) for a_, b_ in zip(*mine, strict=True))
    same(log_p.exp(), p)
    same(log_q.exp(), q)
    same(eq.expected_knowledge(log_p, vectors, segment, dialogues), r)
    same(eq.discernment_kl(log_q, log_p, 1 / dialogues), kl / dialogues)
    assert eq.discernment_kl(log_q, log_p, 1 / dialogues) >= 0 and eq.discernment_kl(log_p, log_p, 1 / dialogues) == 0
    same(eq.discernment(vectors, prior_signal, segment, 0.3), eq.discernment(vectors * 0.3, prior_signal, segment))
    of_rows = eq.shares(torch.full((sum(sizes),), 1 / dialogues, dtype=torch.float64))
    same(eq.discernment_kl(log_q, log_p, of_rows), kl / max(sum(sizes), 1))

    def whole(vectors: Tensor, a: Tensor, b: Tensor) -> Tensor:
        log_p, log_q = eq.discernment(vectors, a, segment), eq.discernment(vectors, b, segment)
        return (
            eq.discernment_kl(log_q, log_p, 1 / dialogues)
            + eq.expected_knowledge(log_p, vectors, segment, dialogues).square().sum()
        )

    gradcheck(whole, vectors, prior_signal, posterior_signal)


def test_shares_are_those_of_the_rows_that_have_a_weight():
    assert eq.shares(torch.tensor([0.25, 0.0, 0.25, 0.25, 0.0, 0.25])).tolist() == [0.25, 0, 0.25, 0.25, 0, 0.25]
    assert eq.shares(torch.tensor([0.5, 0.5, 0.5])).tolist() == pytest.approx([1 / 3] * 3)
    assert eq.shares(torch.zeros(3)).tolist() == [0, 0, 0] and eq.shares(torch.zeros(0)).shape == (0,)


def test_detaching_the_posterior_is_left_to_the_caller():
    log_q, log_p = (
        eq.discernment(normal(4, 2), normal(1, 2, seed=s).requires_grad_(), torch.zeros(4).long()) for s in (1, 2)
    )
    grads = torch.autograd.grad(eq.discernment_kl(log_q, log_p, 1), (log_q, log_p))
    assert all(g.abs().sum() > 0 for g in grads)


def test_bow_loss():
    log_eta = torch.log_softmax(normal(3, 5), -1)
    replies = [[1, 1, 4], [3], [0, 2]]  # a multiset: the repeated word counts twice
    target = torch.tensor([word for reply in replies for word in reply])
    segment = eq.segment_ids(offsets([3, 1, 2]), 6)
    means = [sum(-float(log_eta[b, w]) for w in reply) / len(reply) for b, reply in enumerate(replies)]
    weight = torch.tensor([1 / (3 * len(reply)) for reply in replies for _ in reply], dtype=torch.float64)
    same(eq.bow_loss(-log_eta[segment, target], weight), sum(means) / 3)
    gradcheck(lambda x: eq.bow_loss(-torch.log_softmax(x, -1)[segment, target], weight), normal(3, 5))


# ---- losses and affect, Eq. 13-17, 19


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
    same(eq.emotion_loss(log_p, torch.tensor(labels), 1 / 3), sum(nll) / 3)

    def whole(r_emo: Tensor, er_0: Tensor, w_aff: Tensor, w_emo: Tensor) -> Tensor:
        r = eq.affect(r_emo, er_0, eq.affect_gate(r_emo, er_0, w_aff))
        return eq.emotion_loss(eq.emotion_log_probability(r, w_emo), torch.tensor(labels), 1 / 3)

    gradcheck(whole, r_emo, er_0, w_aff, w_emo)


def test_fuse_context():
    context, cog, aff, weight, bias = (
        normal(5, 2),
        normal(2, 2, seed=1),
        normal(2, 2, seed=2),
        normal(2, 6, seed=3),
        normal(2, seed=4),
    )
    segment = torch.tensor([0, 0, 0, 1, 1])
    fused = eq.fuse_context(context, cog, aff, segment, weight, bias)
    for i, b in enumerate(segment.tolist()):
        row = torch.cat([context[i], cog[b], aff[b]])
        same(fused[i], [max(0.0, dot(weight[c], row) + float(bias[c])) for c in range(2)])
    assert (fused == 0).any() and (fused > 0).any()
    gradcheck(lambda *a: eq.fuse_context(*a[:3], segment, *a[3:]), context, cog, aff, weight, bias)


def test_cross_entropy_and_generation_loss():
    hidden, weight, bias, target = normal(4, 3), normal(6, 3, seed=1), normal(6, seed=2), torch.tensor([0, 5, 3, 3])
    nll, prediction = eq.linear_cross_entropy(hidden, weight, bias, target)
    for t, word in enumerate(target.tolist()):
        scores = [dot(weight[w], hidden[t]) + float(bias[w]) for w in range(6)]
        same(nll[t], -math.log(softmax(scores)[word]))
        assert prediction[t] == scores.index(max(scores))
    same(eq.generation_loss(nll, 1 / 4), math.fsum(nll.tolist()) / 4)  # averaged, not summed as Eq. 19 is printed
    some = torch.tensor([0.5, 0, 0.5, 0], dtype=torch.float64)  # of rows that only fill up, none
    same(eq.generation_loss(nll, some), (float(nll[0]) + float(nll[2])) / 2)
    assert eq.generation_loss(nll[:0], 1.0) == 0
    tied = torch.zeros(1, 3)
    assert (
        eq.linear_cross_entropy(tied, torch.zeros(6, 3), torch.tensor([0.0, 1, 1, 0, 1, 0]), target[:1])[1].item() == 1
    )
    gradcheck(lambda *a: eq.generation_loss(eq.linear_cross_entropy(*a, target)[0], 1 / 4), hidden, weight, bias)


def test_cross_entropy_of_rows_with_several_targets():
    hidden, weight, bias = normal(4, 3), normal(6, 3, seed=1), normal(6, seed=2)
    target, cu_target = torch.tensor([0, 5, 5, 2]), offsets([2, 0, 1, 1])
    nll, prediction = eq.linear_cross_entropy(hidden, weight, bias, target, cu_target)
    alone = eq.linear_cross_entropy(hidden[[0, 0, 2, 3]], weight, bias, target)[0]
    same(nll, alone)
    assert prediction.equal(eq.linear_cross_entropy(hidden, weight, bias, torch.zeros(4, dtype=torch.int64))[1])
    gradcheck(lambda *a: eq.linear_cross_entropy(*a, target, cu_target)[0], hidden, weight, bias)


def test_greatest_is_a_stable_sort():
    generator = torch.Generator().manual_seed(1)
    for rows, columns, levels in itertools.product((1, 5), (1, 2, 17, 300), (1, 3, 1000)):
        values = torch.randint(levels, (rows, columns), generator=generator).float()
        values[values == 0] = -math.inf
        for k in {1, min(2, columns), columns // 2 or 1, columns}:
            top, place = eq.greatest(values, k)
            expected, order = values.sort(dim=1, descending=True, stable=True)
            assert torch.equal(top, expected[:, :k]) and torch.equal(place, order[:, :k])


def test_top_words():
    hidden, weight, bias = normal(3, 4), normal(7, 4, seed=1), normal(7, seed=2)
    bias[5] = -math.inf
    for k in range(1, 8):
        value, word = eq.top_words(hidden, weight, bias, k)
        for t in range(3):
            p = softmax([dot(weight[v], hidden[t]) + float(bias[v]) for v in range(7)])
            order = sorted(range(7), key=lambda v, p=p: -p[v])
            assert word[t].tolist() == order[:k]
            same(value[t], [math.log(p[v]) if p[v] else -math.inf for v in order[:k]])
    flat = torch.zeros(7, 4, dtype=hidden.dtype)
    tied = eq.top_words(hidden, flat, torch.tensor([0.0, 2, 1, 2, 1, 2, 0], dtype=hidden.dtype), 4)[1]
    assert tied.tolist() == [[1, 3, 5, 2]] * 3


def test_diversity():
    # counts 6 3 0 3: RF / max RF = 1, .5, 0, .5, so 1 - it = 0, .5, 1, .5, of mean .5, which rescaled to 1 doubles them
    weights = eq.diversity_weights(torch.tensor([6, 3, 0, 3]))
    same(weights, [0.0, 1, 2, 1])
    for even in ([0, 0, 0], [5, 5, 5]):
        same(eq.diversity_weights(torch.tensor(even)), [1.0, 1, 1])
    nll, target = torch.tensor([1.0, 2, 4], dtype=torch.float64), torch.tensor([2, 0, 1])
    same(eq.diversity_loss(nll, target, weights, 1 / 3), (2 * 1 + 0 * 2 + 1 * 4) / 3)
    assert eq.diversity_loss(nll[:0], target[:0], weights, 1.0) == 0
    large = eq.diversity_weights(torch.tensor([2**62, 2**61, 0]))  # no overflow after any number of steps
    same(large, [0.0, 1, 2])
    gradcheck(lambda x: eq.diversity_loss(x, target, weights, 1 / 3), nll)


def test_sums_of_losses():
    bow, kl, coarse, fine, emotion, generation, diversity = (
        torch.tensor(float(v), dtype=torch.float64) for v in (1, 2, 4, 8, 16, 32, 64)
    )
    alignment = eq.alignment_loss(bow, kl, coarse, fine, 0.2)
    same(alignment, 1 + 2 + 4 + 0.2 * 8)
    same(eq.total_loss(alignment, emotion, generation, diversity, (1.0, 1.0, 1.0, 1.5)), 8.6 + 16 + 32 + 96)
    same(eq.total_loss(alignment, emotion, generation, diversity, (0.5, 2.0, 3.0, 0.0)), 4.3 + 32 + 96)


# ---- dtypes


def _star(vertices: int) -> tuple[Tensor, Tensor]:
    """A hub joined to all vertices; each other vertex joined to the hub."""
    indices = torch.cat([torch.arange(vertices), torch.zeros(vertices - 1, dtype=torch.int64)])
    return torch.tensor([0, *range(vertices, 2 * vertices)]), indices


SEGMENT = torch.tensor([0] * 700 + [1] * 3 + [3])


def three(*shape: int) -> list[Tensor]:
    return [normal(*shape, seed=seed) for seed in range(3)]


def star_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eq.graph_attention(q, k, v, *_star(700))


PRECISION: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "segment_sum": (lambda x: eq.segment_sum(x, SEGMENT, 4) / 700, [normal(704, 3) + 1]),
    "segment_sum of one column": (lambda x: eq.segment_sum(x, SEGMENT, 4) / 700, [normal(704) + 1]),
    "segment_mean": (lambda x: eq.segment_mean(x, SEGMENT, 4), [normal(704, 3) + 1]),
    "segment_log_softmax": (lambda x: eq.segment_log_softmax(x, SEGMENT, 4), [normal(704, scale=4)]),
    "graph_attention": (star_attention, three(700, 2, 5)),
    "graph_attention, equal values": (star_attention, [*three(700, 2, 5)[:2], torch.ones(700, 2, 5)]),
    "discernment": (lambda v, s: eq.discernment(v, s, SEGMENT), [normal(704, 3), normal(4, 3, seed=1)]),
    "standardized": (lambda x: eq.standardized(x, torch.tensor(700)), [normal(700, 3) + 4]),
    "expected_knowledge": (
        lambda v, s: eq.expected_knowledge(eq.discernment(v, s, SEGMENT), v, SEGMENT, 4),
        [normal(704, 3), normal(4, 3, seed=1)],
    ),
    "bilinear_mim": (
        lambda x, y, w: eq.bilinear_mim(x, y, w, reduction="none"),
        [normal(300, 8), normal(300, 8, seed=1), normal(8, 8) / 8],
    ),
    "packed_attention": (
        lambda q, k, v: eq.packed_attention(q, k, v, offsets([3, 5]), offsets([700, 1])),
        [normal(8, 2, 5), normal(701, 2, 5, seed=1), normal(701, 2, 5, seed=2) + 1],
    ),
    "linear_cross_entropy": (
        lambda h, w, b: eq.linear_cross_entropy(h, w, b, torch.arange(40))[0],
        [normal(40, 16), normal(900, 16, seed=1), normal(900, seed=2)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRECISION)
def test_error_is_bounded_by_the_dtype(name: str, dtype: torch.dtype):
    """Against float64 on the same rounded inputs; the bound does not grow with the length of the sums."""
    function, inputs = PRECISION[name]
    rounded = [x.to(dtype) for x in inputs]
    out, truth = function(*rounded), function(*(x.double() for x in rounded))
    bound = 8 * torch.finfo(dtype).eps * truth.abs().max().clamp(min=1)
    assert (out.double() - truth).abs().max() <= bound
