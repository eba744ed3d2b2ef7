"""Attention of packed sequences and the decoder's cross-attention: against loops, with dropout by counter."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from helpers import close, dot, generator, gradcheck, normal, offsets, same, slow_philox, softmax
from torch import Tensor

from case_fast import equations as eq
from case_fast.ops import Source

SEQUENCES = [  # lengths of queries, lengths of keys
    ([1], [1]), ([3], [5]), ([2, 1, 7], [2, 1, 7]), ([4, 2], [0, 3]), ([3, 1], [0, 0]), ([0, 2], [3, 1]), ([0], [0]),
    ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]), ([5, 9], [9, 5]),
]


def slow_attention(q: Tensor, k: Tensor, v: Tensor, rows: list[int], keys: list[tuple[int, int]], causal: bool, scale: float,
                   longest: int = 0, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """Query by query; keys: (first row, how many) of each sequence of queries."""
    out, row = torch.zeros_like(q), 0
    for n, (first, m) in zip(rows, keys, strict=True):
        for place in range(n):
            seen = max(0, min(m, place + 1 + m - n)) if causal else m
            for h in range(q.shape[1] if seen else 0):
                weights = softmax([scale * dot(q[row, h], k[first + j, h]) for j in range(seen)])
                for j, weight in enumerate(weights):
                    if dropout_p:
                        e = row * longest + j
                        word = slow_philox((e & 0xFFFFFFFF, e >> 32, h, 0), (seed & 0xFFFFFFFF, seed >> 32))[0]
                        weight = weight / (1 - dropout_p) if word >= math.floor(dropout_p * 2**32) else 0.0
                    out[row, h] += weight * v[first + j, h]
            row += 1
    return out


def ranges(keys: list[int]) -> list[tuple[int, int]]:
    return list(zip(offsets(keys)[:-1].tolist(), keys, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows, keys", SEQUENCES)
def test_packed_attention(rows: list[int], keys: list[int], causal: bool):
    heads, d = 2, 3
    q, k, v = normal(sum(rows), heads, d), normal(sum(keys), heads, d, seed=1), normal(sum(keys), heads, d, seed=2)
    cu_q, cu_k = offsets(rows), offsets(keys)
    for scale in (None, 1.3):
        expected = slow_attention(q, k, v, rows, ranges(keys), causal, d**-0.5 if scale is None else scale)
        same(eq.packed_attention(q, k, v, cu_q, cu_k, causal, scale), expected)
    gradcheck(lambda *a: eq.packed_attention(*a, cu_q, cu_k, causal), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", [0, 2**40 + 3, 2**63 - 1])
def test_dropout_by_the_number_of_query_and_key(seed: int, causal: bool):
    rows, keys = [3, 0, 2, 1], [4, 1, 0, 5]
    q, k, v = normal(6, 2, 3), normal(10, 2, 3, seed=1), normal(10, 2, 3, seed=2)
    found = eq.packed_attention(q, k, v, offsets(rows), offsets(keys), causal, None, 0.3, seed)
    same(found, slow_attention(q, k, v, rows, ranges(keys), causal, 3**-0.5, 5, 0.3, seed))
    gradcheck(lambda *a: eq.packed_attention(*a, offsets(rows), offsets(keys), causal, None, 0.3, seed), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_sequences_share_keys_and_leave_room(dropout_p: float, causal: bool):
    rows, room, length, of = [2, 1, 4, 0, 3], [5, 3, 0, 7], [4, 1, 0, 7], [3, 0, 3, 1, 2]
    q, k, v = normal(10, 2, 3), normal(15, 2, 3, seed=1), normal(15, 2, 3, seed=2)
    starts = offsets(room).tolist()
    expected = slow_attention(q, k, v, rows, [(starts[s], length[s]) for s in of], causal, 3**-0.5, 7, dropout_p, 5)
    used = torch.cat([torch.arange(starts[s], starts[s] + length[s]) for s in range(4)])
    k, v = (torch.full_like(x, math.nan).index_copy(0, used, x[used]) for x in (k, v))
    found = eq.packed_attention(q, k, v, offsets(rows), offsets(room), causal, None, dropout_p, 5, torch.tensor(of),
                                torch.tensor(length))
    same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_attention_does_not_depend_on_the_batch(dtype: torch.dtype):
    rng = random.Random(0)
    rows, keys = [rng.randint(1, 40) for _ in range(24)], [rng.randint(0, 40) for _ in range(24)]
    q, k, v = (
        t.to(dtype) for t in (normal(sum(rows), 2, 5), normal(sum(keys), 2, 5, seed=1), normal(sum(keys), 2, 5, seed=2))
    )
    together = eq.packed_attention(q, k, v, offsets(rows), offsets(keys)).split(rows)
    for s, (a, b, c) in enumerate(zip(q.split(rows), k.split(keys), v.split(keys), strict=True)):
        alone = eq.packed_attention(a, b, c, offsets([rows[s]]), offsets([keys[s]]))
        same(alone, together[s], 1e-6 if dtype == torch.float32 else 1e-14)
    spoiled = k.clone()
    spoiled[offsets(keys)[3]] = math.nan  # a sequence's NaN is its own
    dirty = eq.packed_attention(q, spoiled, v, offsets(rows), offsets(keys)).split(rows)
    assert keys[3] and dirty[3].isnan().all()
    assert all(a.equal(b) for s, (a, b) in enumerate(zip(dirty, together, strict=True)) if s != 3)


# ---- the decoder's sources


def made_sources(width: int, heads: int, d: int, keys: list[list[int]], seed: int = 3) -> list[Source]:
    g = generator(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [
        Source(made(sum(lengths), heads, d), made(sum(lengths), heads, d), offsets(lengths), 1 + made(width) / 4, made(width) / 4,
               made(heads * d, width) / 2, made(width, heads * d) / 2)
        for lengths in keys
    ]


def slow_cross_attention(hidden: Tensor, rows: list[int], keys: list[list[int]], sources: list[Source]) -> Tensor:
    for lengths, s in zip(keys, sources, strict=True):
        mean, variance = hidden.mean(1, keepdim=True), (hidden - hidden.mean(1, keepdim=True)).square().mean(1, keepdim=True)
        normed = (hidden - mean) / torch.sqrt(variance + 1e-5) * s.norm_weight + s.norm_bias
        query = (normed @ s.query_weight.T).view(-1, *s.key.shape[1:])
        attended = slow_attention(query, s.key, s.value, rows, ranges(lengths), False, s.key.shape[2] ** -0.5)
        hidden = hidden + attended.flatten(1) @ s.output_weight.T
    return hidden


@pytest.mark.parametrize("rows, keys", [
    ([2, 1, 2], [[2, 1, 1], [1, 0, 3], [0, 0, 2]]), ([1, 1], [[0, 0]]), ([0, 2], [[2, 3], [4, 0]]), ([], [[]]), ([3], [[5]]),
])
def test_cross_attention(rows: list[int], keys: list[list[int]]):
    hidden, sources = normal(sum(rows), 4), made_sources(4, 2, 3, keys)
    same(eq.cross_attention(hidden, offsets(rows), sources), slow_cross_attention(hidden, rows, keys, sources))
    sizes = [len(s.floats()) for s in sources]

    def call(hidden: Tensor, *floats: Tensor) -> Tensor:
        given = [replace(s, **dict(zip(NAMES, floats[sum(sizes[:i]) :], strict=False))) for i, s in enumerate(sources)]
        return eq.cross_attention(hidden, offsets(rows), given, 1e-5, 0.2, 0.3, 7)

    gradcheck(call, hidden, *[x for s in sources for x in s.floats()])


NAMES = ("key", "value", "norm_weight", "norm_bias", "query_weight", "output_weight")


def test_each_source_drops_weights_and_outputs_of_its_own():
    seeds = [eq.source_seed(seed, place, part) for seed in range(4) for place in range(3) for part in (0, 1)]
    assert len(set(seeds)) == 24 and all(0 <= s < 2**63 for s in (*seeds, eq.source_seed(2**63 - 1, 32767, 1)))
    hidden, rows = normal(7, 5), [3, 4]
    (one,) = made_sources(5, 2, 3, [[4, 6]])
    alone = eq.cross_attention(hidden, offsets(rows), [one], output_dropout_p=0.5, seed=9)
    added = eq.cross_attention(hidden, offsets(rows), [one]) - hidden
    keep = [slow_philox((e, 0, 0, 0), (9, (1 << 47) >> 32))[0] >= 2**31 for e in range(35)]
    assert close(alone - hidden, 2 * added * torch.tensor(keep).view(7, 5), 1e-12)


def test_what_a_source_is_read_with():
    hidden, (one,) = normal(3, 5), made_sources(5, 2, 5, [[5]])
    unit = torch.eye(5, dtype=torch.float64)
    told = replace(one, value=torch.stack((unit, unit), 1), output_weight=torch.cat((unit, unit), 1) / 2)  # weights
    weights = slow_cross_attention(hidden, [3], [[5]], [told]) - hidden
    same(eq.source_attention(hidden, one), weights)
    assert close(weights.sum(1), torch.ones(3, dtype=torch.float64), 1e-12)


def test_beams_are_rows_of_one_sequence_or_share_keys():
    hidden, keys = normal(6, 5), [[4, 6], [0, 3]]
    sources = made_sources(5, 2, 3, keys)
    as_rows = eq.cross_attention(hidden, offsets([3, 3]), sources)
    shared = [replace(s, key_of=torch.tensor([0, 0, 0, 1, 1, 1])) for s in sources]
    same(eq.cross_attention(hidden, offsets([1] * 6), shared), as_rows)
