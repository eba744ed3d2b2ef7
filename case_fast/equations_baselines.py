"""The baselines' equations, one plain-torch function each, in the order of docs/models.md; `case_fast.equations` is CASE's.

No parameters, no state, any float dtype: the oracle of the tests and what the models call. Shapes and ragged rows as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from case_fast.ops.reference import greatest, key_of, philox4x32, segment_ids


def label_smoothed(nll: Tensor, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor, smoothing: float, pad: int
                   ) -> Tensor:
    """(M,) KL of the smoothed target distribution to the model's, up to its entropy, which has no gradient.

    The target has 1 - smoothing at the word itself, smoothing / (V - 2) at every other word but PAD, which has 0. Without any
    (M, V) tensor: with z = weight h + bias and lse = nll + z_y,
    (1 - e) nll + e / (V - 2) ((V - 2) lse - sum_v z_v + z_y + z_pad).

    Args:
        nll: (M,) -log P(target).
        hidden: (M, d).
        weight, bias: (V, d), (V,) of the words.
    """
    words = weight.shape[0]
    of_target = (hidden * F.embedding(target, weight)).sum(-1) + bias[target]
    of_all = hidden @ weight.sum(0) + bias.sum()
    of_pad = hidden @ weight[pad] + bias[pad]
    others = (words - 2) * (nll + of_target) - of_all + of_target + of_pad
    return (1 - smoothing) * nll + smoothing / (words - 2) * others


def emotion_scale(scale: str, dialogues: int | Tensor, words: int | Tensor) -> float | Tensor:
    """lambda of L = L_gen + lambda L_emo, L_gen a mean over target words: "one" 1; "dialogue" B / M, as if both were summed over
    the batch; "batch" 1 / M, as if words were summed and emotions averaged, which the released Multi-TRS, MoEL and MIME do."""
    return {"one": 1.0, "dialogue": dialogues / words, "batch": 1 / words}[scale]


# ---- MIME (Majumder et al., 2020)


def standard_normal(rows: int, width: int, seed: int | Tensor, device: torch.device | None = None) -> Tensor:
    """(rows, width) float64 draws from N(0, 1), a function of (seed, row, column) alone: Box and Muller's cosine of words 0 and 1
    of Philox(counter = (cell low, cell high, 0, 2), key = seed). The counter's 2 keeps them apart from dropout's draws."""
    cell = torch.arange(rows * width, device=device)
    counter = torch.stack([cell & 0xFFFFFFFF, cell >> 32, torch.zeros_like(cell), torch.full_like(cell, 2)], dim=1)
    word = philox4x32(counter, key_of(seed)).double()
    radius = (-2 * ((word[:, 0] + 1) * 2**-32).log()).sqrt()
    return (radius * (2 * math.pi * word[:, 1] * 2**-32).cos()).view(rows, width)


def gaussian_kl(posterior: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor]) -> Tensor:
    """(B,) KL(q || p) of normal distributions with means and logarithms of variances (B, d)."""
    (mean_q, log_q), (mean_p, log_p) = posterior, prior
    return 0.5 * (log_p - log_q + (log_q.exp() + (mean_q - mean_p) ** 2) / log_p.exp() - 1).sum(-1)


def mimicry(positive: Tensor, negative: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """The emotion of the speaker's polarity and the other one, (B, d) each, of those of both polarities; is_positive (B,)."""
    mine = is_positive.unsqueeze(-1)
    return torch.where(mine, positive, negative), torch.where(mine, negative, positive)


# ---- KEMP (Li et al., 2022)


def mean_attention(query: Tensor, key: Tensor, row_dialogue: Tensor, key_dialogue: Tensor, dialogues: int) -> Tensor:
    """(S,) how much each key is attended to: softmax(q . k D^-1/2) over a dialogue's keys, averaged over heads and over its rows.

    Args:
        query (M, H, D), key (S, H, D): of packed rows, whose dialogues are row_dialogue (M,) and key_dialogue (S,).
    """
    scores = torch.einsum("mhd,shd->hms", query, key) * query.shape[-1] ** -0.5
    apart = row_dialogue.unsqueeze(1) != key_dialogue
    weights = scores.masked_fill(apart, -math.inf).softmax(-1).masked_fill(apart, 0)  # a row without keys: all 0, not NaN
    rows = torch.zeros(dialogues, dtype=query.dtype, device=query.device)
    rows = rows.index_add(0, row_dialogue, torch.ones_like(row_dialogue, dtype=query.dtype)).clamp(min=1)
    return weights.mean(0).sum(0) / rows[key_dialogue]


# ---- MoEL (Lin et al., 2019)


def listener_gates(score: Tensor, k: int) -> Tensor:
    """(B, K) weights of the listeners: softmax over the k greatest scores of each row, of equals those of the lower numbers; 0
    elsewhere. score (B, K); all of them where K is less than k."""
    _, place = greatest(score.detach(), min(k, score.shape[1]))
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, place, True)
    return score.masked_fill(~chosen, -math.inf).softmax(-1)


def forcing_probability(step: Tensor, schedule: float, floor: float) -> Tensor:
    """() float64: floor + (1 - floor) exp(-step / schedule), how often a step gives the gates of the gold emotions."""
    return floor + (1 - floor) * (-step.double() / schedule).exp()


def coin(step: Tensor, probability: Tensor, seed: int | Tensor) -> Tensor:
    """() bool, true with ``probability`` (): word 0 of Philox(counter = (step, 0, 0, 7), key = seed) < floor(probability 2^32).
    The counter's 7 keeps it apart from what else is drawn by the seed."""
    zero = torch.zeros_like(step)
    word = philox4x32(torch.stack([step & 0xFFFFFFFF, zero, zero, torch.full_like(step, 7)]).unsqueeze(0), key_of(seed))[0, 0]
    return word < (probability * 2**32).floor()


def forced_gates(gates: Tensor, emotion: Tensor, forced: Tensor) -> Tensor:
    """(B, K): 1 at the emotion (B,) where ``forced`` () is true and the emotion known, not -1; else the ``gates`` (B, K)."""
    known = (emotion >= 0).unsqueeze(1)
    gold = (emotion.unsqueeze(1) == torch.arange(gates.shape[1], device=gates.device)).to(gates.dtype)
    return torch.where(forced & known, gold, gates)


# ---- EmpDG (Li et al., 2020)


def interleave(a: Tensor, cu_a: Tensor, segment_a: Tensor, b: Tensor, cu_b: Tensor, segment_b: Tensor) -> tuple[Tensor, Tensor]:
    """(n + m, d) rows of a and then of b of each sequence, and their offsets (s + 1,), by one copy of each row to its place.

    Args:
        a (n, d), b (m, d): packed rows, with offsets cu (s + 1,) and the sequence of each row, segment (n,) and (m,).
    """
    place_a = torch.arange(len(a), device=a.device) + cu_b[segment_a]
    place_b = torch.arange(len(b), device=b.device) + cu_a[segment_b + 1]
    rows = torch.cat([a, b])
    return torch.empty_like(rows).index_copy(0, torch.cat([place_a, place_b]), rows), cu_a + cu_b


def uniform(count: int, seed: int | Tensor, device: torch.device | None = None) -> Tensor:
    """(count,) float64 draws from U(0, 1), a function of (seed, place) alone: (u + 1/2) 2^-32 of word 0 of
    Philox(counter = (place, 0, 0, 8), key = seed). The counter's 8 keeps them apart from what else is drawn by the seed."""
    place = torch.arange(count, device=device)
    zero = torch.zeros_like(place)
    word = philox4x32(torch.stack([place & 0xFFFFFFFF, zero, zero, torch.full_like(place, 8)], dim=1), key_of(seed))[:, 0]
    return (word.double() + 0.5) * 2**-32


Packed = tuple[Tensor, Tensor]
"""Rows (n, d) of sequences that lie end to end, and their offsets (s + 1,)."""


def largest_of_pairs(rows: Tensor, cu: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(s, h): max over t of ReLU(W [o_t ; o_{t+1}] + b) for each sequence, 0 where it has no two rows.

    Args:
        rows (n, d), cu (s + 1,): packed; weight (h, 2d), bias (h,): a convolution of width 2.
    """
    segment = segment_ids(cu, rows.shape[0])
    pairs = F.relu(F.linear(torch.cat([rows[:-1], rows[1:]], dim=-1), weight, bias))
    pairs = pairs * (segment[:-1] == segment[1:]).unsqueeze(-1)  # 0, the least of all, across two sequences
    place = segment[:-1].unsqueeze(-1).expand_as(pairs)
    return pairs.new_zeros(cu.shape[0] - 1, pairs.shape[1]).scatter_reduce(0, place, pairs, "amax")


def critic_losses(score: Callable[[Tensor, Tensor], Tensor], generated: Packed, real: Packed, share: Tensor, weight: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """The two parts of L_D (Gulrajani et al., 2017), () each: the mean over sequences of score(generated) - score(real), and of
    (|| d score(o^) / d o^ || - 1)^2 with o^ = a o_generated + (1 - a) o_real over as many rows as both have.

    Only ``score`` is differentiated twice: o^ has no past.

    Args:
        score: (s,) of packed rows and their offsets.
        generated, real: of the same s sequences, of any lengths.
        share: (s,) a.
        weight: (s,) each one's share in the means.
    """
    weight = weight.to(generated[0].dtype)
    difference = (weight * (score(*generated) - score(*real))).sum()
    cu = F.pad(torch.minimum(generated[1].diff(), real[1].diff()).cumsum(0), (1, 0))
    segment = segment_ids(cu, int(cu[-1]))
    place = torch.arange(len(segment), device=cu.device) - cu[segment]
    first, second = (rows.detach()[own[segment] + place] for rows, own in (generated, real))
    part = share.to(first.dtype)[segment].unsqueeze(-1)
    mixed = (part * first + (1 - part) * second).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(score(mixed, cu).sum(), mixed, create_graph=True)
    penalty = (weight * (_norms(slope, segment, len(weight)) - 1).square()).sum()
    return difference, penalty


def _norms(rows: Tensor, segment: Tensor, count: int) -> Tensor:
    """(count,) Euclidean norm of all rows (n, d) of each sequence together; its gradient at 0 is 0."""
    squares = rows.new_zeros(count).index_add(0, segment, rows.square().sum(-1))
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
